// The one description of a linear attention problem that Python hands to every native kernel.
//
// Python (fastattn/linear/native.py) fills it by field name, csrc/bindings.cpp exposes it. What is computed:
// fastattn/linear/problem.py. Real below is float, double for float64.
#pragma once

#include "dense_params.h"

namespace fastattn {

enum class Feature : int32_t { kIdentity, kElu, kRelu, kSoftmax };

// Shapes: query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), out (B, Hq, Nq, Dv), each with a unit
// column stride; with first_row they are packed sequences, which `batch` then counts. Per step, in Real: decay, beta,
// denominator and gradients of the first two, (B, Hq, N, 1); with vector_decay, decay has M columns of stride 1.
// Per sequence, in Real: kv (B, Hq, M, Dv), normalizer (B, Hq, 1, M), log_scale (B, Hq, 1, 1), of unit column strides.
struct LinearParams {
  int64_t batch = 0, heads_q = 0, heads_kv = 0, seqlen_q = 0, seqlen_k = 0;  // lengths: of the longest sequence
  int64_t head_dim = 0, head_dim_v = 0, features = 0;                       // D, Dv, M
  Dtype dtype = Dtype::kFloat32;  // of query, key, value, out and their gradients
  Feature feature = Feature::kIdentity;
  double feature_eps = 0, scale = 1;
  bool causal = false, normalize = false, vector_decay = false;

  View query, key, value;
  View decay, beta;  // absent: none
  View key_mask;     // (B, 1, Nk, 1), bool as bytes; absent: every key takes part
  const void* projection = nullptr;    // (M, D), Real; absent: features are those of the numbers themselves, M = D
  const void* feature_bias = nullptr;  // (M,), Real

  View initial_kv, initial_normalizer, initial_log_scale;  // absent: nothing came before

  View out, denominator;  // written by the forward, read by the backward; denominator with normalize
  View final_kv, final_normalizer, final_log_scale;  // written by the forward; absent: not wanted

  // Backward only. Those of key and value are per query head, (B, Hq, Nk, ...).
  View grad_out, grad_kv, grad_normalizer;  // the latter two may be absent
  View grad_query, grad_key, grad_value;
  View grad_decay, grad_beta, grad_initial_kv, grad_initial_normalizer;  // absent: not wanted

  int32_t threads = 1;
  void* scratch = nullptr;  // 64-byte aligned, as much as the kernel's scratch function says
};

}  // namespace fastattn
