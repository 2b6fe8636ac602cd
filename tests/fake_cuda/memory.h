// Device memory that is host memory: poison at birth, guards on both sides, and a quarantine after death, so that a
// stale pointer never points into a younger allocation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

struct Allocation {
    long number;
    size_t size;
    bool device; // else pinned host memory
};

class Memory {
public:
    static constexpr size_t GUARD = 256, QUARANTINE = size_t(256) << 20;

    size_t total = size_t(80) << 30, poisoned = SIZE_MAX;
    std::string faults;

    ~Memory() { release_all(); }

    uintptr_t allocate(size_t size, bool device) {
        size_t whole = (size + 2 * GUARD + 255) / 256 * 256;
        auto *block = static_cast<unsigned char *>(std::aligned_alloc(256, whole));
        if (block == nullptr)
            return 0;
        if (size <= poisoned)
            std::memset(block, 0xFF, whole);
        uintptr_t start = reinterpret_cast<uintptr_t>(block) + GUARD;
        paint(start, size);
        live_[start] = {device ? ++device_count_ : ++pinned_count_, size, device};
        used_ += device ? size : 0;
        return start;
    }

    // Whether this was the start of a live allocation of that kind, without damage.
    int release(uintptr_t start, bool device) {
        auto found = live_.find(start);
        if (found == live_.end() || found->second.device != device) {
            fault("free of " + describe(start) + ", which is not " + (device ? "device" : "pinned") + " memory");
            return code::INVALID_VALUE;
        }
        bool sound = check_guards("free");
        used_ -= device ? found->second.size : 0;
        retire(start, found->second);
        live_.erase(found);
        return sound ? code::SUCCESS : code::ILLEGAL_ADDRESS;
    }

    // The live allocation that holds this address, or nullptr; `start` receives where it begins.
    const Allocation *find(uintptr_t address, uintptr_t *start = nullptr) const {
        return holder(live_, address, start);
    }

    size_t extent(uintptr_t address) const {
        uintptr_t start = 0;
        const Allocation *found = find(address, &start);
        return found != nullptr && found->device ? start + found->size - address : 0;
    }

    size_t free() const { return total > used_ ? total - used_ : 0; }

    // A range that must lie in device memory.
    bool check_device(uintptr_t address, size_t size, const std::string &what) {
        const Allocation *found = find(address);
        if (found == nullptr || !found->device) {
            fault(what + ": " + describe(address) + " is not device memory");
            return false;
        }
        return check_extent(address, size, what);
    }

    // A range that may also be host memory, about which nothing is known unless it is pinned.
    bool check_any(uintptr_t address, size_t size, const std::string &what) {
        if (address == 0) {
            fault(what + ": null pointer");
            return false;
        }
        if (holder(dead_, address, nullptr) != nullptr) {
            fault(what + ": " + describe(address));
            return false;
        }
        return find(address) == nullptr || check_extent(address, size, what);
    }

    // Host memory that is neither ours nor was.
    bool is_foreign(uintptr_t address) const {
        return address != 0 && find(address) == nullptr && holder(dead_, address, nullptr) == nullptr;
    }

    bool check_host(uintptr_t address, size_t size, const std::string &what) {
        const Allocation *found = find(address);
        if (found != nullptr && found->device) {
            fault(what + ": " + describe(address) + " is device memory, not host memory");
            return false;
        }
        return check_any(address, size, what);
    }

    // Every damaged guard is reported once, then repaired.
    bool check_guards(const std::string &after) {
        bool sound = true;
        for (const auto &[start, each] : by_number()) {
            if (intact(start - GUARD, GUARD) && intact(start + each.size, GUARD))
                continue;
            bool before = !intact(start - GUARD, GUARD);
            fault(after + ": write " + (before ? "before" : "behind") + " " + describe(start));
            paint(start, each.size);
            sound = false;
        }
        return sound;
    }

    // "memory 3+16" rather than an address: the same in every run.
    std::string describe(uintptr_t address) const {
        uintptr_t start = 0;
        if (address == 0)
            return "null";
        if (const Allocation *found = holder(live_, address, &start))
            return place(*found, address - start);
        if (const Allocation *found = holder(dead_, address, &start))
            return place(*found, address - start) + " (freed)";
        return "host";
    }

    std::string leaks() const {
        std::string text;
        for (const auto &[start, each] : by_number())
            text += place(each, 0) + ": " + std::to_string(each.size) + " bytes\n";
        return text;
    }

    void fault(const std::string &text) { faults += text + "\n"; }

private:
    using Blocks = std::map<uintptr_t, Allocation>;

    static const Allocation *holder(const Blocks &blocks, uintptr_t address, uintptr_t *start) {
        auto next = blocks.upper_bound(address);
        if (next == blocks.begin())
            return nullptr;
        const auto &[first, each] = *std::prev(next);
        if (address >= first + each.size)
            return nullptr;
        if (start != nullptr)
            *start = first;
        return &each;
    }

    // In the order in which they were born, so that texts are the same in every run.
    std::vector<std::pair<uintptr_t, Allocation>> by_number() const {
        std::vector<std::pair<uintptr_t, Allocation>> all(live_.begin(), live_.end());
        std::sort(all.begin(), all.end(), [](const auto &a, const auto &b) {
            return std::pair(!a.second.device, a.second.number) < std::pair(!b.second.device, b.second.number);
        });
        return all;
    }

    bool check_extent(uintptr_t address, size_t size, const std::string &what) {
        uintptr_t start = 0;
        const Allocation *found = find(address, &start);
        if (size <= start + found->size - address)
            return true;
        fault(what + ": " + std::to_string(size) + " bytes at " + describe(address) + ", which has " +
              std::to_string(start + found->size - address) + " left");
        return false;
    }

    static std::string place(const Allocation &each, size_t offset) {
        std::string text = (each.device ? "memory " : "pinned ") + std::to_string(each.number);
        return offset == 0 ? text : text + "+" + std::to_string(offset);
    }

    static void paint(uintptr_t start, size_t size) {
        std::memset(reinterpret_cast<void *>(start - GUARD), 0xA5, GUARD);
        std::memset(reinterpret_cast<void *>(start + size), 0xA5, GUARD);
    }

    static bool intact(uintptr_t address, size_t size) {
        const auto *bytes = reinterpret_cast<const unsigned char *>(address);
        for (size_t i = 0; i < size; ++i)
            if (bytes[i] != 0xA5)
                return false;
        return true;
    }

    void retire(uintptr_t start, const Allocation &each) {
        if (each.size > poisoned)
            return std::free(reinterpret_cast<void *>(start - GUARD));
        std::memset(reinterpret_cast<void *>(start), 0xFF, each.size);
        dead_[start] = each;
        order_.push_back(start);
        for (dead_bytes_ += each.size; dead_bytes_ > QUARANTINE; order_.pop_front()) {
            auto oldest = dead_.find(order_.front());
            dead_bytes_ -= oldest->second.size;
            std::free(reinterpret_cast<void *>(oldest->first - GUARD));
            dead_.erase(oldest);
        }
    }

    void release_all() {
        for (const Blocks *blocks : {&live_, &dead_})
            for (const auto &[start, each] : *blocks)
                std::free(reinterpret_cast<void *>(start - GUARD));
    }

    Blocks live_, dead_;
    std::deque<uintptr_t> order_;
    size_t used_ = 0, dead_bytes_ = 0;
    long device_count_ = 0, pinned_count_ = 0;
};
