#include "violations.h"

#include <torch/csrc/Exceptions.h>

#include <utility>

namespace sim {

namespace {

// Arrives in Python as offload_engine.sim.violations.Violation. The class is looked up while the
// error is translated, where Python's lock is held.
struct ViolationError : torch::PyTorchError {
  using torch::PyTorchError::PyTorchError;

  PyObject* python_type() override {
    static PyObject* type = look_up();
    return type ? type : PyExc_RuntimeError;
  }

  static PyObject* look_up() {
    PyObject* module = PyImport_ImportModule("offload_engine.sim.violations");
    PyObject* type = module ? PyObject_GetAttrString(module, "Violation") : nullptr;
    if (!type) PyErr_Clear();
    return type;
  }
};

}  // namespace

const char* name_of(Check check) {
  switch (check) {
    case Check::UnorderedRead: return "unordered-read";
    case Check::UnorderedWrite: return "unordered-write";
    case Check::UnorderedFree: return "unordered-free";
    case Check::UseAfterFree: return "use-after-free";
    case Check::SourceChanged: return "source-changed";
    case Check::PinnedFree: return "pinned-free";
  }
  return "unknown";
}

void Violations::found(Check check, std::string text) {
  const bool is_allowed = allowed_ >> static_cast<int>(check) & 1;
  entries_.push_back({check, is_allowed ? State::Allowed : State::Unraised, std::move(text)});
  n_unraised_ += !is_allowed;
}

void Violations::raise() {
  std::string text;
  for (Entry& entry : entries_) {
    if (entry.state != State::Unraised) continue;
    if (text.empty())
      text = std::string("sim violation: ") + name_of(entry.check) + ": " + entry.text;
    entry.state = State::Raised;
  }
  if (n_unraised_ > 1)
    text += " (and " + std::to_string(n_unraised_ - 1) + " more: see sim.violations())";
  n_unraised_ = 0;
  throw ViolationError(text);
}

int64_t Violations::allow(int64_t mask) { return std::exchange(allowed_, mask); }

void Violations::clear() {
  entries_.clear();
  n_unraised_ = 0;
  allowed_ = 0;
}

}  // namespace sim
