#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

namespace sim {

// Calls `f` on each tensor in `value` and puts what it returns in its place.
template <typename F>
void replace_tensors(c10::IValue& value, F f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = f(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> replaced;
    for (const at::Tensor& tensor : value.toTensorVector())
      replaced.push_back(tensor.defined() ? f(tensor) : tensor);
    value = std::move(replaced);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> replaced;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      replaced.push_back(tensor && tensor->defined() ? std::optional(f(*tensor)) : tensor);
    value = std::move(replaced);
  }
}

}  // namespace sim
