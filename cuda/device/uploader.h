// Feeds the device from any memory of the host, mapped files included: two pinned buffers are
// filled and sent in turn, so that the host reads a piece while the device takes the one before. It
// knows nothing of what the pieces are.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>

#include "device/memory.h"

namespace camelid::cuda {

class Uploader {
 public:
  // Large enough that starting a copy costs nothing beside it, small enough to stay in L2 until the
  // kernel that unpacks it has read it.
  static constexpr std::size_t kPieceBytes = std::size_t{4} << 20;

  explicit Uploader(cudaStream_t stream, std::size_t piece_bytes = kPieceBytes)
      : stream_(stream), piece_bytes_(piece_bytes) {
    for (Buffer& buffer : buffers_) buffer.memory = allocate_pinned(piece_bytes);
  }
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  ~Uploader() {
    for (Buffer& buffer : buffers_) {
      try {
        buffer.sent.wait();
      } catch (const Error&) {  // told by whoever waits for the stream
      }
    }
  }

  cudaStream_t stream() const { return stream_; }
  std::size_t piece_bytes() const { return piece_bytes_; }

  // Where to write the next piece. Waits until the last but one has left this place.
  std::byte* next() {
    buffers_[turn_].sent.wait();
    return buffers_[turn_].memory.get();
  }

  // Sends the first bytes of next() to where they belong as they are.
  void send_to(std::byte* to, std::size_t bytes) {
    Buffer& buffer = buffers_[turn_];
    turn_ ^= 1u;
    copy_to_device(to, buffer.memory.get(), bytes, stream_);
    buffer.sent.record(stream_);
  }

  // Copies to the device from any memory of the host, piece by piece; it has been read on return.
  void copy(std::byte* to, const void* from, std::size_t bytes) {
    const auto* source = static_cast<const std::byte*>(from);
    for (std::size_t at = 0; at < bytes; at += piece_bytes_) {
      const std::size_t n = bytes - at < piece_bytes_ ? bytes - at : piece_bytes_;
      std::memcpy(next(), source + at, n);
      send_to(to + at, n);
    }
  }

  // Sends the first bytes of next(). Launches on stream() find them where this says, until the next
  // send().
  const std::byte* send(std::size_t bytes) {
    if (!staged_) staged_ = allocate_device(piece_bytes_);
    Buffer& buffer = buffers_[turn_];
    turn_ ^= 1u;
    copy_to_device(staged_.get(), buffer.memory.get(), bytes, stream_);
    buffer.sent.record(stream_);
    return staged_.get();
  }

  // Gives back what send() took of the device's memory, until the next one.
  void release() { staged_.reset(); }

 private:
  struct Buffer {
    PinnedMemory memory;
    Event sent;
  };
  cudaStream_t stream_;
  std::size_t piece_bytes_;
  DeviceMemory staged_;
  std::array<Buffer, 2> buffers_;
  unsigned turn_ = 0;
};

}  // namespace camelid::cuda
