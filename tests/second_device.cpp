// A device for tests, "pretend": two of them, whose memory is the host's and whose operations run
// on the CPU. What a GPU refuses is refused: tensors of two devices in one operation, numpy()
// without cpu(); and float64, as Apple's do. Built and loaded by tests/second_device.py.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using Sizes = c10::SymIntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

constexpr auto kKind = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kCount = 2;
thread_local DeviceIndex current = 0;

// --- memory, and which device is current ---------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, Device(kKind, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(kKind, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kKind; }
  Device exchangeDevice(Device to) const override {
    const Device before = getDevice();
    setDevice(to);
    return before;
  }
  Device getDevice() const override { return {kKind, current}; }
  void setDevice(Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(Device to) const noexcept override {
    current = to.has_index() ? to.index() : 0;
  }
  Stream getStream(Device of) const override { return Stream(Stream::DEFAULT, of); }
  Stream getNewStream(Device of, int) const override { return Stream(Stream::DEFAULT, of); }
  Stream exchangeStream(Stream to) const override { return to; }
  DeviceIndex deviceCount() const noexcept override { return kCount; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return kCount; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex to) const override { current = to; }
  DeviceIndex exchangeDevice(DeviceIndex to) const override { return std::exchange(current, to); }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override {
    return to < 0 ? current : std::exchange(current, to);
  }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// --- tensors -------------------------------------------------------------------------------------

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::ScalarType allowed(Maybe<at::ScalarType> dtype) {
  const auto type = c10::dtype_or_default(dtype);
  TORCH_CHECK(type != at::kDouble, "Cannot convert a tensor to float64: the device has none");
  return type;
}

IntArrayRef plain(Sizes sizes) { return C10_AS_INTARRAYREF_SLOW(sizes); }

Tensor empty(Sizes size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device,
             Maybe<bool>, Maybe<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(kKind, current)));
  return at::detail::empty_generic(plain(size), &memory, kKeys, allowed(dtype), format);
}

Tensor empty_strided(Sizes size, Sizes stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>,
                     Maybe<Device> device, Maybe<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(kKind, current)));
  const auto type = allowed(dtype);
  return at::detail::empty_strided_generic(plain(size), plain(stride), &memory, kKeys, type);
}

Tensor view(const Tensor& self, Sizes size) { return at::native::view(self, plain(size)); }

Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, Maybe<c10::SymInt> offset) {
  Maybe<int64_t> start;
  if (offset) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, plain(size), plain(stride), start);
}

Tensor reshape_alias(const Tensor& self, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(self, plain(size), plain(stride));
}

const Tensor& resize_(const Tensor& self, Sizes size, Maybe<at::MemoryFormat> format) {
  return at::native::resize_(self, plain(size), format);
}

Tensor& set_(Tensor& self, at::Storage source, c10::SymInt offset, Sizes size, Sizes stride) {
  const auto start = offset.guard_int(__FILE__, __LINE__);
  return at::native::set_storage_cpu_(self, source, start, plain(size), plain(stride));
}

// The same memory as the CPU sees it.
Tensor on_cpu(const Tensor& tensor) {
  if (tensor.device().type() != kKind) return tensor;
  const auto count = static_cast<int64_t>(tensor.storage().nbytes() / tensor.itemsize());
  auto all = at::from_blob(tensor.storage().mutable_data(), {count},
                           tensor.options().device(at::kCPU).requires_grad(false));
  return all.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (to.numel()) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Scalar local_scalar_dense(const Tensor& tensor) { return on_cpu(tensor).item(); }

// --- operations ----------------------------------------------------------------------------------

void collect(const c10::IValue& value, std::vector<Tensor>& found) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) found.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const auto& part : value.toListRef()) collect(part, found);
  }
}

// The device of an operation's tensors. As with CUDA, single numbers and indices may lie on the
// CPU.
Maybe<Device> one_device(const std::string& name, const std::vector<Tensor>& tensors) {
  const bool indexes = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
  Maybe<Device> seen;
  for (const auto& tensor : tensors) {
    const bool is_index = indexes && at::isIntegralType(tensor.scalar_type(), true);
    if (tensor.device().is_cpu() && (tensor.dim() == 0 || is_index)) continue;
    TORCH_CHECK(!seen || *seen == tensor.device(), "Expected all tensors to be on one device, but ",
                name, " got ", *seen, " and ", tensor.device());
    seen = tensor.device();
  }
  return seen;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<Tensor> tensors;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size()))
    collect(value, tensors);
  const auto device = one_device(op.schema().name(), tensors);
  c10::DeviceGuard guard(device && device->type() == kKind ? *device : Device(kKind, current));
  at::native::cpu_fallback(op, stack);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const Maybe<Tensor>& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef output_padding, int64_t groups) {
  const bool has_bias = bias && bias->defined();
  std::vector<Tensor> tensors{input, weight};
  if (has_bias) tensors.push_back(*bias);
  const Device device = *one_device("convolution", tensors);
  Maybe<Tensor> of_cpu;
  if (has_bias) of_cpu = on_cpu(*bias);
  return at::convolution(on_cpu(input), on_cpu(weight), of_cpu, stride, padding, dilation,
                         transposed, output_padding, groups)
      .to(device);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  const Device device = *one_device("convolution_backward", {gradient, input, weight});
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), IntArrayRef({weight.size(0)}), stride,
      padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const Tensor& t) { return t.defined() ? t.to(device) : t; };
  return {back(of_input), back(of_weight), back(of_bias)};
}

// A GPU counts whole numbers too.
Tensor histc(const Tensor& self, int64_t bins, const Scalar& low, const Scalar& high) {
  const auto counts = at::histc(on_cpu(self).to(at::kFloat), bins, low, high);
  return counts.to(self.scalar_type()).to(self.device());
}

int64_t sdp_choice(const Tensor&, const Tensor&, const Tensor&, const Maybe<Tensor>&, double, bool,
                   Maybe<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("view", &view);
  m.impl("unfold", &at::native::unfold);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("histc", &histc);
}

TORCH_LIBRARY(second_device, m) {
  m.def("current() -> int", [] { return static_cast<int64_t>(current); });
  m.def("choose(int index) -> ()", [](int64_t to) { current = static_cast<DeviceIndex>(to); });
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sdp_choice)
}
