// Finds accesses to memory that nothing orders, whatever order they happened to run in: who knows
// of whose accesses (the happens-before of threads that meet, fence and pass flags), and who
// touched each byte last. It knows nothing of fibers, and only builds that report accesses use it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <vector>

namespace camelid::cuda::emulated {

// Counts what orders a thread's accesses for others. Accesses that are in flight have no tick yet.
using Tick = std::uint32_t;
constexpr Tick kInFlight = 0xffffffffu;

// Of threads the last tick whose accesses are known, [thread of the block], for some blocks.
using Ticks = std::vector<Tick>;
using Known = std::map<int, std::shared_ptr<const Ticks>>;
using KnownPtr = std::shared_ptr<const Known>;  // shared by all who learned it together

inline KnownPtr join(const KnownPtr& a, const KnownPtr& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto both = std::make_shared<Known>(*a);
  for (const auto& [block, ticks] : *b) {
    std::shared_ptr<const Ticks>& mine = (*both)[block];
    if (!mine) mine = ticks;
    if (mine == ticks) continue;
    auto latest = std::make_shared<Ticks>(*mine);
    for (std::size_t i = 0; i < latest->size(); ++i) {
      (*latest)[i] = std::max((*latest)[i], (*ticks)[i]);
    }
    mine = std::move(latest);
  }
  return both;
}

// One thread's place in the order.
struct History {
  int block = 0, thread = 0, n_threads = 0;  // of its block
  Tick now = 1;
  KnownPtr known;   // what is ordered before all that it does from now on
  KnownPtr fenced;  // what it knew, itself included, at its last fence_blocks: atomics tell that
  KnownPtr looked;  // what atomics told it, to be known after the next fence_blocks

  bool knows(int of_block, int of_thread, Tick tick) const {
    if (tick == kInFlight) return false;
    if (of_block == block && of_thread == thread) return true;
    if (!known) return false;
    const auto found = known->find(of_block);
    return found != known->end() && (*found->second)[static_cast<std::size_t>(of_thread)] >= tick;
  }
  // What it knows together with what it did itself; what it does next is not part of that.
  KnownPtr tell() {
    auto told = known ? std::make_shared<Known>(*known) : std::make_shared<Known>();
    std::shared_ptr<const Ticks>& mine = (*told)[block];
    auto ticks = mine ? std::make_shared<Ticks>(*mine)
                      : std::make_shared<Ticks>(static_cast<std::size_t>(n_threads));
    (*ticks)[static_cast<std::size_t>(thread)] = now++;
    mine = std::move(ticks);
    return told;
  }
  void fence() {
    known = join(known, looked);
    looked = nullptr;
    fenced = tell();
  }
};

// After a meeting all know what each did and knew before.
inline void meet(const std::vector<History*>& all) {
  KnownPtr known;
  for (const History* one : all) known = join(known, one->known);
  const History& first = *all.front();
  auto met = known ? std::make_shared<Known>(*known) : std::make_shared<Known>();
  std::shared_ptr<const Ticks>& block = (*met)[first.block];
  auto ticks = block ? std::make_shared<Ticks>(*block)
                     : std::make_shared<Ticks>(static_cast<std::size_t>(first.n_threads));
  for (History* one : all) (*ticks)[static_cast<std::size_t>(one->thread)] = one->now++;
  block = std::move(ticks);
  for (History* one : all) one->known = met;
}

struct Access {
  std::int32_t code;  // where in the library, from a place that reports know
  std::int32_t block;
  Tick tick;  // 0: no access
  std::int16_t thread;
  std::uint8_t bytes;  // of the word, a bit for each
  bool write;
};
static_assert(sizeof(Access) == 16);

// The last accesses to each word of a memory: as many as are remembered, writes before reads.
class Shadow {
 public:
  explicit Shadow(std::size_t n_bytes)
      // Zeros that take no memory until they are touched.
      : words_(static_cast<Word*>(std::calloc(n_bytes / kWordBytes + 1, sizeof(Word)))) {
    if (!words_) throw std::bad_alloc();
  }

  // Remembers an access by a thread. Returns an earlier one that it races with, or null.
  const Access* add(std::size_t offset, std::size_t n_bytes, Access access, const History& by) {
    for (std::size_t at = offset; at < offset + n_bytes;) {
      const std::size_t first = at % kWordBytes;
      const std::size_t n = std::min(kWordBytes - first, offset + n_bytes - at);
      access.bytes = static_cast<std::uint8_t>(((1u << n) - 1) << first);
      if (const Access* other = add(words_[at / kWordBytes], access, by)) return other;
      at += n;
    }
    return nullptr;
  }

  // A thread's write that was in flight has arrived.
  void arrive(std::size_t offset, std::size_t n_bytes, const History& by) {
    for (std::size_t word = offset / kWordBytes; word * kWordBytes < offset + n_bytes; ++word) {
      for (Access& one : words_[word].last) {
        const bool own = one.block == by.block && one.thread == by.thread;
        if (own && one.tick == kInFlight) one.tick = by.now;
      }
    }
  }

 private:
  static constexpr std::size_t kWordBytes = 4;
  struct Word {
    Access last[4];
  };
  struct Free {
    void operator()(Word* words) const { std::free(words); }
  };

  static const Access* add(Word& word, const Access& access, const History& by) {
    Access* place = nullptr;
    for (Access& old : word.last) {
      if (old.tick == 0) {
        if (!place) place = &old;
        continue;
      }
      const bool ordered = by.knows(old.block, old.thread, old.tick);
      if (!ordered && (old.bytes & access.bytes) && (old.write || access.write)) return &old;
      // Whoever races with the old one then races with the new one too.
      const bool replaces =
          ordered && (old.bytes & ~access.bytes) == 0 && (access.write || !old.write);
      if (!replaces) continue;
      old.tick = 0;
      place = &old;
    }
    if (!place) place = forget(word, access);
    if (place) *place = access;
    return nullptr;
  }
  // Another read, else nothing: writes are kept.
  static Access* forget(Word& word, const Access& access) {
    for (Access& old : word.last) {
      if (!old.write) return &old;
    }
    return access.write ? &word.last[0] : nullptr;
  }

  std::unique_ptr<Word[], Free> words_;
};

}  // namespace camelid::cuda::emulated
