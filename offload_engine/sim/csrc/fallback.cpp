// Any operator: check where its arguments are and what they must wait for, then run the CPU's
// kernel on CPU tensors that alias device memory.
//
// Composite kernels would otherwise win over a backend's fallback and compute some operators
// another way than the CPU does (group_norm, convolution). So the fallback is registered by name
// for each operator that has a CPU kernel, and results are the CPU's, bit for bit.
#include "fallback.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <string_view>
#include <unordered_set>

#include "device.h"
#include "stack.h"
#include "tensors.h"

namespace sim {

namespace {

using c10::IValue;
using c10::OperatorHandle;
using Stack = torch::jit::Stack;

// ---- what is known of an operator before it runs ------------------------------------------------

struct OpFacts {
  const char* name;
  std::vector<bool> writes;  // per argument
  bool is_metadata_only;     // touches no byte: views, questions about shapes
  bool waits;                // the host needs the answer, on a GPU too
  int generator = -1;        // the argument that is one
  int indices = -1;          // the argument that may be on the CPU, or be masks
};

bool answers_the_host(const c10::FunctionSchema& schema) {
  static const std::unordered_set<std::string_view> names = {
      "aten::nonzero",     "aten::masked_select",      "aten::equal",
      "aten::_unique",     "aten::_unique2",           "aten::unique_dim",
      "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::repeat_interleave"};
  return names.count(schema.name());
}

bool is_metadata_only(const c10::FunctionSchema& schema) {
  static const std::unordered_set<std::string_view> names = {"aten::_fused_sdp_choice",
                                                             "aten::is_set_to"};
  if (names.count(schema.name())) return true;
  for (const auto& argument : schema.arguments())
    if (argument.alias_info() && !argument.alias_info()->isWrite()) return true;  // a view
  return false;
}

OpFacts describe(const c10::FunctionSchema& schema) {
  OpFacts facts{schema.name().c_str(), {}, is_metadata_only(schema), answers_the_host(schema)};
  const auto generator_type = c10::OptionalType::create(c10::GeneratorType::get());
  const auto index_type = c10::ListType::create(c10::OptionalType::ofTensor());
  for (const auto& argument : schema.arguments()) {
    const int index = static_cast<int>(facts.writes.size());
    if (argument.type()->isSubtypeOf(*generator_type)) facts.generator = index;
    if (argument.type()->isSubtypeOf(*index_type)) facts.indices = index;
    facts.writes.push_back(argument.alias_info() && argument.alias_info()->isWrite());
  }
  return facts;
}

// ---- one call -----------------------------------------------------------------------------------

struct Operand {
  at::Tensor tensor, alias;
  Region region;
  int argument;
};

class Call {
 public:
  Call(const OpFacts& facts, const OperatorHandle& op, Stack* stack)
      : facts_(facts),
        op_(op),
        stack_(*stack),
        first_argument_(stack->size() - facts.writes.size()) {}

  void run() {
    collect();
    {
      std::lock_guard guard(machine().lock);
      begin();
    }
    run_cpu_kernel();
    std::lock_guard guard(machine().lock);
    finish();
  }

 private:
  IValue& argument(size_t index) { return stack_[first_argument_ + index]; }
  bool writes(const Operand& operand) const { return facts_.writes[operand.argument]; }

  void collect();
  void check_host_tensor(const at::Tensor& tensor, size_t index) const;
  [[noreturn]] void mixed_devices(const at::Tensor& tensor, size_t index) const;
  void begin();
  void run_cpu_kernel();
  void finish();
  bool has_mask() const;
  void follow_resize(Operand& operand);
  at::Tensor to_sim(const at::Tensor& result);
  c10::Storage adopt(const at::Tensor& result);

  const OpFacts& facts_;
  const OperatorHandle& op_;
  Stack& stack_;
  const size_t first_argument_;
  c10::SmallVector<Operand, 6> operands_;
  c10::Device device_{kSim, -1};
  Access access_;
  size_t touched_nbytes_ = 0;
  c10::SmallVector<std::pair<c10::StorageImpl*, c10::Storage>, 2> adopted_;
};

void Call::collect() {
  for (size_t i = 0; i < facts_.writes.size() && !device_.has_index(); ++i)
    replace_tensors(argument(i), [&](const at::Tensor& tensor) {
      if (!device_.has_index() && is_sim(tensor)) device_ = tensor.device();
      return tensor;
    });
  TORCH_CHECK(device_.has_index(), facts_.name, " has no kernel for the sim device");
  for (size_t i = 0; i < facts_.writes.size(); ++i)
    replace_tensors(argument(i), [&](const at::Tensor& tensor) {
      if (tensor.device() == device_)
        operands_.push_back({tensor, {}, {}, static_cast<int>(i)});
      else
        check_host_tensor(tensor, i);
      return tensor;
    });
}

// A CPU scalar may stand where a device tensor is expected, and CPU indices where indices are.
void Call::check_host_tensor(const at::Tensor& tensor, size_t index) const {
  if (!tensor.is_cpu() || facts_.writes[index]) mixed_devices(tensor, index);
  const bool is_index = static_cast<int>(index) == facts_.indices;
  if (tensor.dim() > 0 && !is_index) mixed_devices(tensor, index);
}

void Call::mixed_devices(const at::Tensor& tensor, size_t index) const {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two "
              "devices, ", device_, " and ", tensor.device(), "! (when checking argument ",
              op_.schema().arguments()[index].name(), " of ", facts_.name, ")");
}

void Call::begin() {
  if (facts_.generator >= 0 && argument(facts_.generator).isGenerator())
    argument(facts_.generator) = cpu_generator(argument(facts_.generator).toGenerator());
  if (facts_.is_metadata_only) {
    for (Operand& operand : operands_) operand.region = region_of(operand.tensor);
    machine().violations.raise_unraised();
    return;
  }
  Work work(current_stream(device_.index()), facts_.name);
  access_ = work.access();
  for (Operand& operand : operands_) {
    operand.region = region_of(operand.tensor);
    touched_nbytes_ += operand.tensor.numel() * operand.tensor.itemsize();
    if (!writes(operand)) operand.region.read_by(work);
  }
  for (Operand& operand : operands_)
    if (writes(operand)) operand.region.written_by(work);
  machine().violations.raise_unraised();
}

void Call::run_cpu_kernel() {
  size_t next = 0;
  for (size_t i = 0; i < facts_.writes.size(); ++i)
    replace_tensors(argument(i), [&](const at::Tensor& tensor) -> at::Tensor {
      if (!is_sim(tensor)) return tensor;
      Operand& operand = operands_[next++];
      operand.alias = cpu_alias(tensor, operand.region);
      return operand.alias;
    });
  static const c10::DispatchKeySet above_the_kernel =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  c10::impl::ExcludeDispatchKeyGuard guard(above_the_kernel);
  op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
}

void Call::finish() {
  for (Operand& operand : operands_)
    if (writes(operand)) follow_resize(operand);
  const size_t n_returns = op_.schema().returns().size();
  for (size_t i = stack_.size() - n_returns; i < stack_.size(); ++i)
    replace_tensors(stack_[i], [&](const at::Tensor& result) { return to_sim(result); });
  if (facts_.is_metadata_only) return;
  machine().run_compute(access_.actor, touched_nbytes_);
  if (facts_.waits || has_mask()) machine().synchronize_always(access_.actor);
}

// A mask is an index whose length only the device knows.
bool Call::has_mask() const {
  for (const Operand& operand : operands_)
    if (operand.argument == facts_.indices && operand.tensor.scalar_type() == at::kBool)
      return true;
  return false;
}

// The kernel may have resized what it writes (`out=`): the device tensor takes over the new shape,
// and new bytes where the old ones were too few.
void Call::follow_resize(Operand& operand) {
  at::TensorImpl* to = operand.tensor.unsafeGetTensorImpl();
  const at::TensorImpl* from = operand.alias.unsafeGetTensorImpl();
  if (to->sizes() != from->sizes() || to->strides() != from->strides())
    to->set_sizes_and_strides(from->sizes(), from->strides(), to->storage_offset());
  const c10::Storage& bytes = operand.region.bytes;
  Block* block = operand.region.block;
  if (bytes.nbytes() == (block ? block->nbytes : 0)) return;
  if (block && block->data == bytes.data()) return;
  if (block) block->bytes = c10::Storage();  // the kernel has freed them
  Block* fresh = device_memory().adopt(bytes, access_);
  at::StorageImpl* storage = operand.tensor.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(own(fresh));
  storage->set_nbytes(fresh->nbytes);
}

at::Tensor Call::to_sim(const at::Tensor& result) {
  if (!result.device().is_cpu()) return result;
  for (const Operand& operand : operands_)
    if (result.is_same(operand.alias)) return operand.tensor;
  for (const Operand& operand : operands_)
    if (operand.region.block && result.storage().is_alias_of(operand.region.bytes))
      return make_sim_tensor(operand.tensor.storage(), result);
  touched_nbytes_ += result.numel() * result.itemsize();
  return make_sim_tensor(adopt(result), result);
}

c10::Storage Call::adopt(const at::Tensor& result) {
  c10::StorageImpl* bytes = result.storage().unsafeGetStorageImpl();
  for (const auto& [cpu, storage] : adopted_)
    if (cpu == bytes) return storage;
  TORCH_INTERNAL_ASSERT(!facts_.is_metadata_only, facts_.name, " made new memory");
  c10::Storage storage;
  if (bytes->nbytes() == 0)
    storage = c10::Storage(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, device_),
                           device_allocator(), true);
  else
    storage = storage_of(device_memory().adopt(result.storage(), access_));
  adopted_.push_back({bytes, storage});
  return storage;
}

// ---- registration -------------------------------------------------------------------------------

class CpuKernel final : public c10::OperatorKernel {
 public:
  explicit CpuKernel(const c10::FunctionSchema& schema) : facts_(describe(schema)) {}
  void operator()(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    Call(facts_, op, stack).run();
  }

 private:
  const OpFacts facts_;
};

// For operators that appear later, of other libraries.
void run_any(const OperatorHandle& op, Stack* stack) {
  const OpFacts facts = describe(op.schema());
  Call(facts, op, stack).run();
}

bool takes_tensors(const c10::FunctionSchema& schema) {
  for (const auto& argument : schema.arguments())
    if (argument.type()->str().find("Tensor") != std::string::npos) return true;
  return false;
}

// Composite operators that choose how to compute by device. The CPU's choice is wanted.
bool chooses_by_device(const c10::OperatorName& name) {
  static const std::unordered_set<std::string_view> names = {
      "aten::convolution", "aten::_convolution", "aten::convolution_backward"};
  return names.count(name.name) && name.overload_name.empty();
}

bool wants_cpu_kernel(const OperatorHandle& op) {
  if (op.operator_name().name.rfind("aten::", 0) != 0 || !op.hasSchema()) return false;
  if (op.hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) return false;
  if (chooses_by_device(op.operator_name())) return true;
  return op.hasKernelForDispatchKey(c10::DispatchKey::CPU) && takes_tensors(op.schema());
}

}  // namespace

void register_fallback() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto* anything = new torch::Library(torch::Library::IMPL, "_",
                                             c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  anything->fallback(torch::CppFunction::makeFromBoxedFunction<&run_any>());
  static auto* aten = new torch::Library(torch::Library::IMPL, "aten",
                                         c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op || !wants_cpu_kernel(*op)) continue;
    const std::string full_name =
        name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    aten->impl(full_name.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                      std::make_unique<CpuKernel>(op->schema())));
  }
}

}  // namespace sim
