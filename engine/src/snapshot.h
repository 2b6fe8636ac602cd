// A job between two ticks as bytes, and back.
//
//     magic "rlsdsnap" | version u32 | step i32 | loss scale f64 | has state, has trace u8, 6 zeros |
//     identity: SHA-256 of bundle, request and parameters, 64 digits | z, its moments, x, its moments, trace: float32 |
//     SHA-256 of everything before, 64 digits
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace rlsd {

struct Job;

std::size_t snapshot_size(const Job &job);

// Of a job whose state, once it has begun, is in its z and x.
std::vector<std::byte> snapshot_of(const Job &job);

// Has a new job go on from there. Throws Error(RLSD_INVALID_ARGUMENT) for bytes that are damaged or of another job.
void restore(Job &job, std::span<const std::byte> snapshot);

}  // namespace rlsd
