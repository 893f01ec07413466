// What writing new keys and values into a KV cache needs: filled by fastattn/dense/native.py, like DenseParams.
#pragma once

#include "dense_params.h"

namespace fastattn {

// New key s of sequence b goes to position key_lengths[b] + s of its cache; query i stands at position key_lengths[b] +
// seqlen_new - seqlen_q + i. The first rotary_dim columns of both turn by the angles of their positions, whose cosines
// and sines are rows of the tables.
struct AppendParams {
  int64_t batch = 0, heads_q = 0, heads_kv = 0, seqlen_q = 0, seqlen_new = 0, head_dim = 0, head_dim_v = 0;
  Dtype dtype = Dtype::kFloat32;  // of all but the tables

  View query, rotated;          // (B, Hq, Sq, D); absent without rotary
  View key, value;              // (B, Hkv, S_new, D) and Dv
  View key_cache, value_cache;  // (B, Hkv, capacity, D) and Dv, or pages; any column stride
  View cos, sin;                // (positions, rotary_dim / 2): row and column strides
  Dtype table_dtype = Dtype::kFloat32;
  int64_t rotary_dim = 0;    // 0: none
  bool interleaved = false;  // columns 2c and 2c + 1 make a pair, rather than c and c + rotary_dim / 2

  const int32_t* key_lengths = nullptr;  // (B,)
  const int32_t* block_table = nullptr;  // as in DenseParams
  int64_t block_table_stride = 0, page_size = 0;

  int32_t threads = 1;
};

}  // namespace fastattn
