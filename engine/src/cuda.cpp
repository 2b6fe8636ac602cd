#include "cuda.h"

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>

namespace rlsd::cuda {
namespace {

constexpr int capability_major = 75, capability_minor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr unsigned non_blocking = 1;                         // CU_STREAM_NON_BLOCKING: no ties to the default stream
constexpr int memory_type = 2, device_memory = 2;            // CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_DEVICE

std::shared_ptr<const Driver> load(const std::string &name) {
    void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
        throw Error(RLSD_NO_DEVICE, text("no NVIDIA driver here: ", name, " cannot be loaded (", dlerror(), ")"));
    auto driver = std::make_shared<Driver>();
#define RLSD_CUDA_READ(field, symbol, arguments)                                                                       \
    driver->field = reinterpret_cast<decltype(driver->field)>(dlsym(library, #symbol));                                \
    if (driver->field == nullptr)                                                                                      \
        throw Error(RLSD_NO_DEVICE, text("the NVIDIA driver is too old: ", name, " has no " #symbol));
    RLSD_CUDA_ENTRIES(RLSD_CUDA_READ)
#undef RLSD_CUDA_READ
    driver->hosted = dlsym(library, "rlsd_fake_driver") != nullptr;
    return driver;
}

}  // namespace

std::shared_ptr<const Driver> Driver::open() {
    static std::mutex mutex;
    static std::map<std::string, std::shared_ptr<const Driver>> known;  // a failed attempt is made again
    const char *path = std::getenv("RLSD_LIBCUDA");
    const std::string name = path != nullptr && *path != '\0' ? path : "libcuda.so.1";
    const std::lock_guard lock(mutex);
    auto &driver = known[name];
    if (driver == nullptr) driver = load(name);
    return driver;
}

void Driver::check(Result result, const char *doing) const {
    if (result == success) return;
    const char *name = nullptr, *why = nullptr;
    error_name(result, &name);
    error_string(result, &why);
    throw Error(result == out_of_memory ? RLSD_OUT_OF_MEMORY : RLSD_RUNTIME_ERROR,
                text(doing, ": ", name != nullptr ? name : "CUDA error", " (", why != nullptr ? why : "no description", ")"));
}

Buffer::Buffer(const Device &device, std::size_t bytes) : device_(&device), bytes_(bytes) {
    const std::string doing = text("cannot allocate ", bytes, " bytes on the device");  // first: it may throw itself
    device.check(device.driver().memory_alloc(&address_, bytes > 0 ? bytes : 1), doing.c_str());
}

// Nothing can be done about an error here; a device that is lost answers every call with one.
Buffer::~Buffer() {
    if (address_ != 0) device_->driver().memory_free(address_);
}

Pinned::Pinned(const Device &device, std::size_t bytes) : device_(device) {
    device.check(device.driver().host_alloc(&memory_, bytes, 0), "cannot allocate page-locked memory");
    std::memset(memory_, 0, bytes);
}

Pinned::~Pinned() { device_.driver().host_free(memory_); }

Event::Event(const Device &device) : device_(device) {
    device.check(device.driver().event_create(&handle_, 0), "cannot make an event");
}

Event::~Event() { device_.driver().event_destroy(handle_); }

void Event::record() { device_.check(device_.driver().event_record(handle_, device_.stream()), "cannot record an event"); }

double Event::seconds_until(const Event &later) const {
    float milliseconds = 0;
    device_.check(device_.driver().event_elapsed(&milliseconds, handle_, later.handle_), "cannot read the time of an event");
    return 1e-3 * double(milliseconds);
}

Device::Device(int ordinal) : driver_(Driver::open()), ordinal_(ordinal) {
    int count = 0, major = 0, minor = 0;
    char name[256] = "";
    check(driver_->init(0), "the NVIDIA driver does not start");
    check(driver_->device_count(&count), "cannot count the devices");
    if (ordinal < 0 || ordinal >= count)
        throw Error(RLSD_NO_DEVICE, text("device is 'cuda:", ordinal, "', but this machine has ", count, " of them"));
    check(driver_->device_get(&device_, ordinal), "cannot open the device");
    check(driver_->device_name(name, sizeof name, device_), "cannot read the device's name");
    check(driver_->device_attribute(&major, capability_major, device_), "cannot read the device's capability");
    check(driver_->device_attribute(&minor, capability_minor, device_), "cannot read the device's capability");
    name_ = name;
    capability_ = 10 * major + minor;
    check(driver_->context_retain(&context_, device_), "cannot open the device's context");
    try {
        const Inside inside(*this);
        check(driver_->stream_create(&stream_, non_blocking), "cannot make a stream");
    } catch (...) {
        driver_->context_release(device_);
        throw;
    }
}

Device::~Device() {
    {
        const Inside inside(*this, std::nothrow);
        driver_->stream_destroy(stream_);
    }
    driver_->context_release(device_);
}

Inside::Inside(const Device &device, std::nothrow_t) noexcept : driver_(device.driver()) {
    driver_.context_get(&before_);
    driver_.context_set(device.context());
}

Inside::Inside(const Device &device) : driver_(device.driver()) {
    driver_.context_get(&before_);
    device.check(driver_.context_set(device.context()), "cannot enter the device's context");
}

std::size_t Device::free_memory() const {
    std::size_t free = 0, total = 0;
    check(driver_->memory_info(&free, &total), "cannot read the device's free memory");
    return free;
}

void Device::upload(DevicePointer to, const void *from, std::size_t bytes) const {
    check(driver_->copy_to_device(to, from, bytes, stream_), "cannot copy to the device");
}

void Device::download(void *to, DevicePointer from, std::size_t bytes) const {
    check(driver_->copy_to_host(to, from, bytes, stream_), "cannot copy from the device");
}

void Device::copy(DevicePointer to, DevicePointer from, std::size_t bytes) const {
    check(driver_->copy_on_device(to, from, bytes, stream_), "cannot copy on the device");
}

void Device::fill(DevicePointer at, unsigned char value, std::size_t bytes) const {
    check(driver_->fill_bytes(at, value, bytes, stream_), "cannot fill memory of the device");
}

void Device::wait() const {
    ++synchronisations;
    check(driver_->stream_wait(stream_), "the device failed");
}

// A recording that failed leaves no graph.
void Device::leave_capture() const noexcept {
    GraphHandle *graph = nullptr;
    driver_->stream_end_capture(stream_, &graph);
}

// The driver does not know the host's ordinary memory, and says that the value is invalid.
Where where_is(const Driver &driver, const void *pointer) {
    int type = 0;
    const Result result = driver.pointer_attribute(&type, memory_type, reinterpret_cast<DevicePointer>(pointer));
    if (result == success) return type == device_memory ? Where::device : Where::host;
    return result == invalid_value ? Where::host : Where::unknown;
}

}  // namespace rlsd::cuda
