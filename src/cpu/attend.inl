// Attention by the type of the cache. Included inside the anonymous namespace of each isa_*.cpp
// that supplies all types, after attention.inl.

void attend(const AttendTask& task, float* scratch) {
  if (task.pages->type == KvType::kF32) {
    attend_pieces<float>(task, scratch);
  } else if (task.pages->type == KvType::kBf16) {
    attend_pieces<std::uint16_t>(task, scratch);
  } else {
    attend_pieces<std::uint8_t>(task, scratch);
  }
}
