// Checks the accesses that kernels report: that they stay inside known memory, are aligned, and are
// ordered with those of other threads (watch.h). Part of fibers.cpp.

#include <dlfcn.h>

namespace camelid::cuda::emulated {

namespace {

enum Kind { kReads, kWrites, kWritesLater };

// "block 0, thread 7 (code+0x1a2b)"; call() of emulated_build.py finds the line.
std::string who(int block, int thread, const void* code) {
  Dl_info library{};
  dladdr(code, &library);
  const auto offset = static_cast<const char*>(code) - static_cast<char*>(library.dli_fbase);
  return cat("block ", block, ", thread ", thread, " (code+0x", std::hex, offset, ")");
}

// The reports come from places where the compiler expects no exception.
void stop(const std::string& message) {
  try {
    fail_launch(message);
  } catch (...) {
    machine.failure = std::current_exception();
  }
  suspend();
}

// A place in this library, from which others are counted.
const char* code_base() { return reinterpret_cast<const char*>(&run); }

void check_order(GuardedBytes& memory, const void* pointer, std::size_t n_bytes, Kind kind,
                 const void* code) {
  const History& me = current->history;
  Access access{};
  access.code = static_cast<std::int32_t>(static_cast<const char*>(code) - code_base());
  access.block = me.block;
  access.thread = static_cast<std::int16_t>(me.thread);
  access.tick = kind == kWritesLater ? kInFlight : me.now;
  access.write = kind != kReads;
  const Access* other = memory.shadow().add(memory.offset_of(pointer), n_bytes, access, me);
  if (!other) return;
  stop(cat(who(me.block, me.thread, code), kind == kReads ? " reads " : " writes ", n_bytes,
           " bytes at ", memory.place_of(pointer), ", and nothing orders this and ",
           other->tick == kInFlight ? "the copy in flight"
           : other->write           ? "the write"
                                    : "the read",
           " by ", who(other->block, other->thread, code_base() + other->code)));
}

void access(const void* pointer, std::size_t n_bytes, Kind kind, const void* code) {
  GuardedBytes* memory = machine.memories.find(pointer);
  if (!memory) return;
  if (memory->holds(pointer, n_bytes)) return check_order(*memory, pointer, n_bytes, kind, code);
  stop(cat(who(current->history.block, current->thread, code),
           kind == kReads ? " reads " : " writes ", n_bytes, " bytes at ",
           memory->place_of(pointer)));
}

}  // namespace

void report(const void* pointer, std::size_t n_bytes, bool writes, std::size_t align,
            const void* code) {
  if (!current) return;  // code of the host
  const auto* byte = static_cast<const std::byte*>(pointer);
  if (byte >= current->stack && byte < current->stack + Stacks::kBytes) return;
  if (reinterpret_cast<std::uintptr_t>(pointer) % align != 0) {
    stop(cat(who(current->history.block, current->thread, code), ": an access of ", n_bytes,
             " bytes to an address that is no multiple of ", align));
  }
  access(pointer, n_bytes, writes ? kWrites : kReads, code);
}

}  // namespace camelid::cuda::emulated

extern "C" {

// ---- what -fsanitize=thread calls before every access, in kernels compiled with it ----

#define CAMELID_REPORTS(bytes)                                                                  \
  void __tsan_read##bytes(void* pointer) {                                                      \
    camelid::cuda::emulated::report(pointer, bytes, false, bytes, __builtin_return_address(0)); \
  }                                                                                             \
  void __tsan_write##bytes(void* pointer) {                                                     \
    camelid::cuda::emulated::report(pointer, bytes, true, bytes, __builtin_return_address(0));  \
  }                                                                                             \
  void __tsan_unaligned_read##bytes(void* pointer) {                                            \
    camelid::cuda::emulated::report(pointer, bytes, false, 1, __builtin_return_address(0));     \
  }                                                                                             \
  void __tsan_unaligned_write##bytes(void* pointer) {                                           \
    camelid::cuda::emulated::report(pointer, bytes, true, 1, __builtin_return_address(0));      \
  }
CAMELID_REPORTS(1)
CAMELID_REPORTS(2)
CAMELID_REPORTS(4)
CAMELID_REPORTS(8)
CAMELID_REPORTS(16)
#undef CAMELID_REPORTS

void __tsan_read_range(void* pointer, std::size_t n_bytes) {
  camelid::cuda::emulated::report(pointer, n_bytes, false, 1, __builtin_return_address(0));
}
void __tsan_write_range(void* pointer, std::size_t n_bytes) {
  camelid::cuda::emulated::report(pointer, n_bytes, true, 1, __builtin_return_address(0));
}
void __tsan_init() { camelid::cuda::emulated::watched = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
