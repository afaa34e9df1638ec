// Checks what kernels report: that accesses stay inside known memory and are ordered with those of
// other threads (watch.h), and that nothing happens that C++ leaves undefined. Part of fibers.cpp.

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

void report(const void* pointer, std::size_t n_bytes, bool writes, const void* code) {
  if (!current) return;  // code of the host
  const auto* byte = static_cast<const std::byte*>(pointer);
  if (byte >= current->stack && byte < current->stack + Stacks::kBytes) return;
  access(pointer, n_bytes, writes ? kWrites : kReads, code);
}

// What a compiler tells of a pointer that does not suit its type.
struct Mismatch {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  std::uint8_t log2_align;
};

void report_undefined(const std::string& what, const void* code) {
  if (current) stop(cat(who(current->history.block, current->thread, code), ": ", what));
}

}  // namespace camelid::cuda::emulated

// What compilers call where -fsanitize is given; the libraries that usually answer are not linked.
extern "C" {

#define CAMELID_ACCESS(name, n_bytes, writes)                                               \
  void __tsan_##name(void* pointer) {                                                       \
    camelid::cuda::emulated::report(pointer, n_bytes, writes, __builtin_return_address(0)); \
  }
#define CAMELID_ACCESSES(bytes)                       \
  CAMELID_ACCESS(read##bytes, bytes, false)           \
  CAMELID_ACCESS(write##bytes, bytes, true)           \
  CAMELID_ACCESS(unaligned_read##bytes, bytes, false) \
  CAMELID_ACCESS(unaligned_write##bytes, bytes, true)
CAMELID_ACCESSES(1)
CAMELID_ACCESSES(2)
CAMELID_ACCESSES(4)
CAMELID_ACCESSES(8)
CAMELID_ACCESSES(16)
#undef CAMELID_ACCESSES
#undef CAMELID_ACCESS

void __tsan_read_range(void* pointer, std::size_t n_bytes) {
  camelid::cuda::emulated::report(pointer, n_bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* pointer, std::size_t n_bytes) {
  camelid::cuda::emulated::report(pointer, n_bytes, true, __builtin_return_address(0));
}
void __tsan_init() { camelid::cuda::emulated::watched = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __ubsan_handle_type_mismatch_v1(const camelid::cuda::emulated::Mismatch* mismatch) {
  camelid::cuda::emulated::report_undefined(
      camelid::cat("uses an address that is no multiple of ", 1 << mismatch->log2_align),
      __builtin_return_address(0));
}

#define CAMELID_UNDEFINED(name, what)                                             \
  void __ubsan_handle_##name(const void*) {                                       \
    camelid::cuda::emulated::report_undefined(what, __builtin_return_address(0)); \
  }
CAMELID_UNDEFINED(out_of_bounds, "an index beside its array")
CAMELID_UNDEFINED(shift_out_of_bounds, "a shift by less than 0 or by too much")
CAMELID_UNDEFINED(add_overflow, "a sum that overflows")
CAMELID_UNDEFINED(sub_overflow, "a difference that overflows")
CAMELID_UNDEFINED(mul_overflow, "a product that overflows")
CAMELID_UNDEFINED(negate_overflow, "a negation that overflows")
CAMELID_UNDEFINED(divrem_overflow, "a division by 0, or that overflows")
CAMELID_UNDEFINED(float_cast_overflow, "a float that does not fit the integer")
#undef CAMELID_UNDEFINED
}
