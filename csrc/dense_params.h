// The one description of a dense attention problem that Python hands to every native kernel.
//
// Python (fastattn/dense/native.py) fills it by field name, csrc/bindings.cpp exposes it, csrc/cpu and csrc/cuda read
// it. It holds plain pointers and numbers only: the native core never sees a torch header.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kBool };

// A strided view of (batch, head, row, column). Strides count elements; 0 broadcasts. A null pointer means "absent".
// With first_row, sequences are packed: that of batch index b has the rows from first_row[b] up to first_row[b + 1].
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  const int32_t* first_row = nullptr;
};

// Rows of a sequence; `longest` is their number where sequences are not packed.
inline int64_t rows_of(const View& view, int64_t b, int64_t longest) {
  return view.first_row ? view.first_row[b + 1] - view.first_row[b] : longest;
}

// Where row `row` of a sequence is, in elements.
inline int64_t row_offset(const View& view, int64_t b, int64_t h, int64_t row) {
  return b * view.stride[0] + h * view.stride[1] + (view.first_row ? row + view.first_row[b] : row) * view.stride[2];
}

// Shapes: query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), out (B, Hq, Sq, Dv),
// lse (B, Hq, Sq) as a view whose column stride is unused. Every tensor has a unit column stride but attn_mask.
//
// Query i of sequence b stands at key position p = i + query_offset + query_start[b] and sees the keys j with
//   max(key_start[b], p - window_left) <= j <= min(key_lengths[b] - 1, p + window_right).
// Absent arrays stand for query_start = 0, key_start = 0, key_lengths = seqlen_k; kUnlimited for an open window side.
struct DenseParams {
  static constexpr int64_t kUnlimited = INT64_MAX;

  int64_t batch = 0, heads_q = 0, heads_kv = 0, seqlen_q = 0, seqlen_k = 0, head_dim = 0, head_dim_v = 0;
  Dtype dtype = Dtype::kFloat32;  // of query, key, value, out and their gradients; lse is float32 (float64 for float64)

  View query, key, value;
  View attn_mask;  // (B, Hq, Sq, Sk); bool keeps where true, float is added to the scores
  Dtype mask_dtype = Dtype::kBool;

  // A block mask in blocks of 64 x 64, beside attn_mask: fastattn/blockmask/lists.py says what the arrays hold.
  View mask_rows, mask_columns;  // (B, Hq, blocks, 4) int32
  const int32_t *mask_row_blocks = nullptr, *mask_column_blocks = nullptr;
  const uint64_t* mask_tiles = nullptr;  // [tile][query], bit j is key j

  const int32_t* query_start = nullptr;  // (B,)
  const int32_t* key_start = nullptr;    // (B,)
  const int32_t* key_lengths = nullptr;  // (B,)
  // Pages: key and value are then (pages, Hkv, page_size, D), key j of sequence b is row j % page_size of page
  // block_table[b, j / page_size], and seqlen_k is what a row of the table holds.
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0, page_size = 0;
  int64_t query_offset = 0;
  bool align_ends = false;  // add, for each sequence, its keys less its queries to query_offset
  int64_t window_left = kUnlimited, window_right = kUnlimited;
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  View alibi_slopes, sinks;  // (B, Hq) and (Hq,) as (1, Hq), in lse's dtype; row and column strides unused
  double dropout_p = 0.0;
  const int64_t* rng = nullptr;  // seed and offset; absent without dropout

  View out, lse;  // written by the forward, read by the backward

  // Backward only. grad_lse and grad_mask may be absent.
  View grad_out, grad_lse;
  View grad_query, grad_key, grad_value;
  View grad_sinks;  // like sinks
  View grad_mask;  // float32 (float64 for float64); 0 strides where attn_mask broadcasts, so it has the bias's own size

  // CPU: how many threads, and working memory: 64-byte aligned, as much as the kernel's scratch function says.
  int32_t threads = 1;
  void* scratch = nullptr;
};

}  // namespace fastattn
