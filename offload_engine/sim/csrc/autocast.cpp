// torch.autocast("sim"): torch's own lists of operators and what becomes of their arguments.
#include "autocast.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "stack.h"
#include "tensors.h"

namespace sim {

namespace {

constexpr c10::DispatchKey kAutocast = c10::DispatchKey::AutocastPrivateUse1;

using Policy = at::autocast::CastPolicy;
using Names = std::vector<const char*>;

#define SIM_NAME_2(op, overload) "aten::" #op "." #overload,
#define SIM_NAME_1(op) "aten::" #op,
#define SIM_PICK(_1, _2, macro, ...) macro
#define SIM_NAME(...) SIM_PICK(__VA_ARGS__, SIM_NAME_2, SIM_NAME_1)(__VA_ARGS__)
const Names kLowerPrecision = {AT_FORALL_LOWER_PRECISION_FP(SIM_NAME)};
const Names kFp32 = {AT_FORALL_FP32(SIM_NAME)};
const Names kFp32Result = {AT_FORALL_FP32_SET_OPT_DTYPE(SIM_NAME)};
const Names kPromote = {AT_FORALL_PROMOTE(SIM_NAME)};
#undef SIM_NAME
#undef SIM_PICK
#undef SIM_NAME_1
#undef SIM_NAME_2

class Cast final : public c10::OperatorKernel {
 public:
  explicit Cast(Policy policy) : policy_(policy) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
    const auto& schema = op.schema();
    const size_t first = stack->size() - schema.arguments().size();
    if (policy_ == Policy::fp32_set_opt_dtype)
      ask_for_fp32(schema, *stack, first);
    else
      cast_arguments(*stack, first);
    op.callBoxed(stack);
  }

 private:
  void cast_arguments(torch::jit::Stack& stack, size_t first) {
    at::ScalarType type =
        policy_ == Policy::fp32 ? at::kFloat : at::autocast::get_autocast_dtype(kSim);
    if (policy_ == Policy::promote)
      for (size_t i = first; i < stack.size(); ++i)
        replace_tensors(stack[i], [&](const at::Tensor& tensor) {
          type = at::autocast::prioritize(type, tensor, kSim);
          return tensor;
        });
    for (size_t i = first; i < stack.size(); ++i)
      replace_tensors(stack[i], [&](const at::Tensor& tensor) {
        return at::autocast::cached_cast(type, tensor, kSim);
      });
  }

  static void ask_for_fp32(const c10::FunctionSchema& schema, torch::jit::Stack& stack,
                           size_t first) {
    const auto dtype = schema.argumentIndexWithName("dtype");
    if (dtype && stack[first + *dtype].isNone() && is_sim(stack[first].toTensor()) &&
        stack[first].toTensor().is_floating_point())
      stack[first + *dtype] = at::kFloat;
  }

  const Policy policy_;
};

}  // namespace

void register_autocast() {
  static auto* anything = new torch::Library(torch::Library::IMPL, "_", kAutocast, __FILE__,
                                             __LINE__);
  anything->fallback(torch::CppFunction::makeFallthrough());
  static auto* aten = new torch::Library(torch::Library::IMPL, "aten", kAutocast, __FILE__,
                                         __LINE__);
  const std::pair<Policy, const Names&> lists[] = {{Policy::lower_precision_fp, kLowerPrecision},
                                                   {Policy::fp32, kFp32},
                                                   {Policy::fp32_set_opt_dtype, kFp32Result},
                                                   {Policy::promote, kPromote}};
  for (const auto& [policy, names] : lists)
    for (const char* name : names)
      aten->impl(name,
                 torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Cast>(policy)));
}

}  // namespace sim
