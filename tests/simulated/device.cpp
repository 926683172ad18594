// An accelerator for machines that have none: memory of its own kind, streams, events and pinned host memory.
//
//     host thread    op  copy(non_blocking)  op  event.synchronize ...
//     stream 0       op  . . . . . . . . . . op      kernels run on the host once their stream's queue is empty,
//     stream 1           +-- waits, copies late --+  what they give comes late; queued work runs in a thread
//
// What a real accelerator hides, this one shows. Results and copies come after a random pause, so that whoever does not
// wait for them reads what was there before; memory that is given back is overwritten, in the order of the stream that
// it was made on; memory that was used on another stream without `record_stream` is counted; a tensor of this device is
// no tensor of the host, so that mixing the two fails as it does with CUDA. Kernels are those of the CPU, on the same
// memory: results are equal to a CPU's to the bit.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <unordered_map>

namespace {

namespace py = pybind11;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using Clock = std::chrono::steady_clock;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex DEVICES = 4;
constexpr int POISON = 0xFF;  // NaN as a float, -1 as an integer

std::atomic<int> pause_microseconds{0};  // the longest pause before a result or a copy
std::atomic<int> unrecorded{0};  // blocks given back that another stream had used without saying so
auto& on_wait = *new py::object();  // is told whenever the host waits for the device

void waits() {
  if (!on_wait) return;
  py::gil_scoped_acquire locked;
  on_wait();
}

// ---------------------------------------------------------------------------------------------- streams and events

struct Mark {  // a point in a stream
  std::mutex mutex;
  std::condition_variable passed_by;
  bool passed = false;
  Clock::time_point when;

  void pass() {
    std::lock_guard lock(mutex);
    passed = true;
    when = Clock::now();
    passed_by.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    passed_by.wait(lock, [&] { return passed; });
  }
  bool query() {
    std::lock_guard lock(mutex);
    return passed;
  }
};

class Queue {  // what a stream still has to do; its thread starts with the first work that cannot be done at once
 public:
  void put(std::function<void()> work, bool at_once = true) {
    {
      std::lock_guard lock(mutex_);
      if (left_ > 0 || !at_once) {
        ++left_;
        works_.push_back(std::move(work));
        if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
        more_.notify_one();
        return;
      }
    }
    work();
  }
  void drain() {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] { return left_ == 0; });
  }
  bool empty() {
    std::lock_guard lock(mutex_);
    return left_ == 0;
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      more_.wait(lock, [&] { return !works_.empty(); });
      auto work = std::move(works_.front());
      works_.pop_front();
      lock.unlock();
      work();
      work = nullptr;
      lock.lock();
      if (--left_ == 0) idle_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable more_, idle_;
  std::deque<std::function<void()>> works_;
  int left_ = 0;
  std::thread thread_;
};

std::mutex streams_mutex;
auto& queues = *new std::map<std::pair<int, int>, Queue*>();  // never taken down: threads may outlive main
int64_t last_stream = 0;

Queue& queue(int device, int64_t id) {
  std::lock_guard lock(streams_mutex);
  auto& found = queues[{device, static_cast<int>(id)}];
  if (!found) found = new Queue();
  return *found;
}
Queue& queue(const Stream& stream) { return queue(stream.device_index(), stream.id()); }

thread_local DeviceIndex current_device = 0;
thread_local std::array<int64_t, DEVICES> current_streams{};

Queue& current_queue(int device) { return queue(device, current_streams[device]); }

void pause(int one_of) {
  thread_local std::mt19937 random(std::random_device{}());
  int most = pause_microseconds;
  if (most && random() % one_of == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % most));
}

using Event = std::shared_ptr<Mark>;

// ---------------------------------------------------------------------------------------------------------- memory

struct Block {
  size_t size;
  int device;
  int64_t stream;
  std::set<int64_t> used, recorded;  // other streams
};

std::mutex memory_mutex;
auto& blocks = *new std::unordered_map<void*, Block>();
auto& spare = *new std::map<std::pair<int, size_t>, std::vector<void*>>();
std::array<int64_t, DEVICES> allocated{}, peak{};

void release(void* pointer) {
  Block block;
  {
    std::lock_guard lock(memory_mutex);
    block = blocks.at(pointer);
    blocks.erase(pointer);
    allocated[block.device] -= block.size;
  }
  std::vector<Event> marks;
  for (auto id : block.used) unrecorded += !block.recorded.contains(id);
  for (auto id : block.recorded) {
    marks.push_back(std::make_shared<Mark>());
    queue(block.device, id).put([mark = marks.back()] { mark->pass(); });
  }
  bool waits = false;
  for (auto& mark : marks) waits |= !mark->query();
  queue(block.device, block.stream).put(
      [=] {
        for (auto& mark : marks) mark->wait();
        std::memset(pointer, POISON, block.size);
        std::lock_guard lock(memory_mutex);
        spare[{block.device, block.size}].push_back(pointer);
      },
      !waits);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    Device device(KIND, current_device);
    if (size == 0) return {nullptr, nullptr, [](void*) {}, device};
    std::lock_guard lock(memory_mutex);
    auto& found = spare[{current_device, size}];
    void* pointer;
    if (found.empty()) {
      pointer = std::aligned_alloc(64, (size + 63) / 64 * 64);
      std::memset(pointer, POISON, size);
    } else {
      pointer = found.back();
      found.pop_back();
    }
    blocks[pointer] = {size, current_device, current_streams[current_device], {}, {}};
    allocated[current_device] += size;
    peak[current_device] = std::max(peak[current_device], allocated[current_device]);
    return {pointer, pointer, release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& data, Stream stream) override {
    std::lock_guard lock(memory_mutex);
    auto found = blocks.find(data.get_context());
    if (found != blocks.end() && found->second.stream != stream.id()) found->second.recorded.insert(stream.id());
  }
  void use(const c10::DataPtr& data, int64_t stream) {
    std::lock_guard lock(memory_mutex);
    auto found = blocks.find(data.get_context());
    if (found != blocks.end() && found->second.stream != stream) found->second.used.insert(stream);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    std::lock_guard lock(memory_mutex);
    stats.allocated_bytes[0].current = allocated[device];
    stats.allocated_bytes[0].peak = peak[device];
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard lock(memory_mutex);
    peak[device] = allocated[device];
  }
};
auto& device_memory = *new DeviceMemory();

std::mutex pinned_mutex;
auto& pinned = *new std::map<const char*, size_t>();

struct PinnedMemory final : c10::Allocator {
  static void release(void* pointer) {
    std::lock_guard lock(pinned_mutex);
    auto found = pinned.find(static_cast<char*>(pointer));
    std::memset(pointer, POISON, found->second);
    pinned.erase(found);
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, [](void*) {}, c10::kCPU};
    void* pointer = std::aligned_alloc(64, (size + 63) / 64 * 64);
    std::lock_guard lock(pinned_mutex);
    pinned[static_cast<char*>(pointer)] = size;
    return {pointer, pointer, release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};
auto& pinned_memory = *new PinnedMemory();

bool is_pinned(const void* pointer) {
  std::lock_guard lock(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(pointer));
  if (after == pinned.begin()) return false;
  auto found = std::prev(after);
  return static_cast<const char*>(pointer) < found->first + found->second;
}

// ------------------------------------------------------------------------------------------------ what torch asks of it

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device device) const override {
    Device before(KIND, current_device);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {KIND, current_device}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < DEVICES, "there are ", int(DEVICES), " simulated devices, not ", device);
    if (device.index() >= 0) current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  static DeviceIndex index(Device device) { return device.index() < 0 ? current_device : device.index(); }
  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, Device(KIND, index(device)), current_streams[index(device)]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::UNSAFE, Device(KIND, index(device)), 0); }
  Stream getNewStream(Device device, int) const override {
    std::lock_guard lock(streams_mutex);
    return Stream(Stream::UNSAFE, Device(KIND, index(device)), ++last_stream);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    auto before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event();
    auto mark = std::make_shared<Mark>();
    *static_cast<Event*>(*event) = mark;
    queue(stream).put([mark] { mark->pass(); });
  }
  void block(void* event, const Stream& stream) const override {
    if (!event) return;
    auto mark = *static_cast<Event*>(event);
    if (!mark->query()) queue(stream).put([mark] { mark->wait(); }, false);
  }
  bool queryEvent(void* event) const override { return !event || (*static_cast<Event*>(event))->query(); }
  void synchronizeEvent(void* event) const override {
    if (!queryEvent(event)) waits();
    if (event) (*static_cast<Event*>(event))->wait();
  }
  bool queryStream(const Stream& stream) const override { return queue(stream).empty(); }
  void synchronizeStream(const Stream& stream) const override {
    waits();
    queue(stream).drain();
  }
  void synchronizeDevice(DeviceIndex device) const override {
    waits();
    std::vector<Queue*> found;
    {
      std::lock_guard lock(streams_mutex);
      for (auto& [key, one] : queues)
        if (key.first == index({KIND, device})) found.push_back(one);
    }
    for (auto* one : found) one->drain();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    device_memory.recordStream(data, stream);
  }
  double elapsedTime(void* from, void* to, DeviceIndex) const override {
    auto begin = *static_cast<Event*>(from), end = *static_cast<Event*>(to);
    TORCH_CHECK(begin->query() && end->query(), "both events must have passed");
    return std::chrono::duration<double, std::milli>(end->when - begin->when).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct DeviceGenerator final : c10::GeneratorImpl {  // random numbers of a device, which a CPU's generator draws
  at::Generator host = at::detail::createCPUGenerator();

  explicit DeviceGenerator(DeviceIndex device)
      : GeneratorImpl(Device(KIND, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t offset) override { TORCH_CHECK(false, "no offsets"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offsets"); }
  void set_state(const c10::TensorImpl& state) override {
    auto self = c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(const_cast<c10::TensorImpl*>(&state));
    host.set_state(at::Tensor(self));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.get_state().getIntrusivePtr(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->host = host.clone();
    return copy;
  }
};

at::Generator& default_generator(DeviceIndex device) {
  static auto& made = *new std::vector<at::Generator>();
  while (made.size() < DEVICES) made.push_back(at::make_generator<DeviceGenerator>(made.size()));
  return made.at(device < 0 ? current_device : device);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice({KIND, device}); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto before = current_device;
    setCurrentDevice(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<DeviceGenerator>(device < 0 ? current_device : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    c10::DeviceGuard guard(storage.device());
    auto data = device_memory.allocate(size);
    if (size_t both = std::min(size, storage.nbytes())) std::memcpy(data.get(), storage.data(), both);
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(size);
  }
};

// --------------------------------------------------------------------------------------------------------- kernels

bool ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == KIND; }

/// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  auto storage = tensor.storage();
  device_memory.use(storage.data_ptr(), current_streams[storage.device().index()]);
  c10::DataPtr data(storage.mutable_data(), nullptr, [](void*) {}, c10::kCPU);
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(KIND)));
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())));
  auto bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, device_memory.allocate(bytes), &device_memory, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  auto like = at::empty(size, at::TensorOptions(at::kMeta).memory_format(format));
  return empty_strided(size, like.strides(), dtype, layout, device, pin);
}

at::Tensor strided_view(
    const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return view;
}

/// A tensor of the CPU as one of this device: the original where it is an alias of one, else a copy.
at::Tensor on_device(
    const at::Tensor& result, const std::vector<std::pair<at::Tensor, at::Tensor>>& aliases, Device device) {
  if (!result.defined() || !result.device().is_cpu()) return result;
  for (auto& [alias, original] : aliases) {
    if (alias.is_same(result)) return original;
    if (result.storage().data() && result.storage().data() == alias.storage().data())
      return strided_view(original, result.sizes(), result.strides(), result.storage_offset());
  }
  auto options = result.options();
  auto made = empty_strided(result.sizes(), result.strides(), result.scalar_type(), {}, device, {});
  auto late = on_host(made);
  current_queue(device.index())
      .put(
          [late, result] {
            pause(4);
            std::memcpy(late.mutable_data_ptr(), result.const_data_ptr(), late.storage().nbytes());
          },
          false);
  return made;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  auto count = schema.arguments().size();
  auto begin = stack->size() - count;
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases;
  std::vector<std::pair<at::Tensor, at::Tensor>> outs;
  Device device(KIND, current_device);
  auto host = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!ours(tensor)) return tensor;
    if (aliases.empty()) {
      device = tensor.device();
      current_queue(device.index()).drain();
    }
    TORCH_CHECK(tensor.device() == device, op.operator_name(), ": tensors on ", device, " and ", tensor.device());
    aliases.emplace_back(on_host(tensor), tensor);
    return aliases.back().first;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor() && ours(value.toTensor()) && schema.arguments()[i].is_out()) {
      outs.emplace_back(at::empty({0}, value.toTensor().options().device(at::kCPU)), value.toTensor());
      device = value.toTensor().device();
      value = outs.back().first;
    } else if (value.isTensor()) {
      auto& tensor = value.toTensor();
      if (tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0 && !op.schema().name().starts_with("aten::index") &&
          !op.schema().name().starts_with("aten::_index"))
        for (size_t j = 0; j < count; ++j) {
          auto& other = (*stack)[begin + j];
          TORCH_CHECK(
              !(other.isTensor() && ours(other.toTensor()) && other.toTensor().dim() > 0), op.operator_name(),
              ": expected all tensors to be on the same device, found ", other.toTensor().device(), " and cpu");
        }
      value = host(tensor);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(host(one));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& one : value.toOptionalTensorVector())
        list.push_back(one ? std::optional(host(*one)) : one);
      value = list;
    } else if (schema.arguments()[i].type()->str().find("Generator") != std::string::npos) {
      auto given = value.isNone() ? default_generator(device.index()) : value.toGenerator();
      if (given.device().type() == KIND) value = static_cast<DeviceGenerator*>(given.unsafeGetGeneratorImpl())->host;
    } else if (value.isDevice()) {
      device = value.toDevice();
      value = Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [result, out] : outs) {
    out.resize_(result.sizes());
    on_host(out).copy_(result);
  }
  auto back = [&](const at::Tensor& tensor) {
    for (auto& [result, out] : outs)
      if (result.is_same(tensor)) return out;
    return on_device(tensor, aliases, device);
  };
  auto returned = schema.returns().size();
  for (auto i = stack->size() - returned; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(back(one));
      value = list;
    }
  }
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  auto device = ours(self) ? self.device() : target.device();
  auto& work = current_queue(device.index());
  auto& other = ours(self) ? target : self;
  bool late = non_blocking && ours(self) != ours(target) && self.scalar_type() == target.scalar_type() &&
      self.sizes() == target.sizes() && self.is_contiguous() && target.is_contiguous() && self.numel() > 0 &&
      is_pinned(other.const_data_ptr());
  if (late) {
    device_memory.use((ours(self) ? self : target).storage().data_ptr(), current_streams[device.index()]);
    work.put(
        [to = target.mutable_data_ptr(), from = self.const_data_ptr(), bytes = self.nbytes(),
         kept = c10::Storage(other.storage())] {  // pinned memory is not given out again before the copy
          pause(2);
          std::memcpy(to, from, bytes);
        },
        false);
    return target;
  }
  if (!ours(target)) waits();
  work.drain();
  if (ours(self) && ours(target) && self.device() != target.device()) current_queue(target.device().index()).drain();
  (ours(target) ? on_host(target) : target).copy_(ours(self) ? on_host(self) : self);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (self.sizes() == size) return self;
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  auto bytes = (self.storage_offset() + self.numel()) * self.itemsize();
  if (static_cast<size_t>(bytes) > self.storage().nbytes()) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  if (stride.empty() && !size.empty()) {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage source) {
  return set_storage(self, source, 0, {static_cast<int64_t>(source.nbytes() / self.itemsize())}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  auto shape = at::infer_size(size, self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), shape);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return strided_view(self, shape, *stride, self.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return strided_view(self, size, stride, self.storage_offset());
}

at::Scalar local_scalar(const at::Tensor& self) {
  waits();
  current_queue(self.device().index()).drain();
  return on_host(self).item();
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups) {
  current_queue(input.device().index()).drain();
  std::optional<at::Tensor> added;
  if (bias && bias->defined()) added = on_host(*bias);
  auto result = at::convolution(
      on_host(input), on_host(weight), added, stride, padding, dilation, transposed, output_padding, groups);
  return on_device(result, {}, input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  current_queue(input.device().index()).drain();
  std::optional<std::vector<int64_t>> biases;
  if (mask[2]) biases = {transposed ? weight.size(1) * groups : weight.size(0)};
  auto [one, two, three] = at::convolution_backward(
      on_host(gradient), on_host(input), on_host(weight),
      biases ? at::OptionalIntArrayRef(*biases) : at::OptionalIntArrayRef(), stride, padding, dilation, transposed,
      output_padding, groups, mask);
  auto device = input.device();
  return {on_device(one, {}, device), on_device(two, {}, device), on_device(three, {}, device)};
}

int64_t attention_choice(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // composed of other operations
}

bool shares_type(const at::Tensor&, const at::Tensor&) {
  return true;  // so that parameters stay the same objects when a module moves, as with CUDA
}

void record_stream(at::Tensor& self, Stream stream) { device_memory.recordStream(self.storage().data_ptr(), stream); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &strided_view);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_fused_sdp_choice", &attention_choice);
  m.impl("record_stream", &record_stream);
  m.impl("_has_compatible_shallow_copy_type", &shares_type);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(KIND, &device_memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("pause_copies", [](int microseconds) { pause_microseconds = microseconds; });
  m.def("default_generator", [](int device) { return default_generator(device); });
  m.def("sleep", [](int microseconds) {
    current_queue(current_device)
        .put([=] { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }, false);
  });
  m.def("on_wait", [](py::object told) { on_wait = told.is_none() ? py::object() : told; });
  m.def("unrecorded", [] { return unrecorded.exchange(0); });
  m.def("set_device", [](int device) { Guard().setDevice(Device(KIND, device)); });
  m.def("current_device", [] { return int(current_device); });
}
