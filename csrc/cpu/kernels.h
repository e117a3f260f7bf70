// The boundary between torch and arithmetic: plain structs and tables of function pointers.
//
// bind.cpp files unpack tensors into these structs; kernel files (scalar.cpp, avx2.cpp, avx512*.cpp) fill the tables.
// Kernel files include this header and csrc/cpu/simd.h only: no torch, no STL, nothing with external linkage but the
// one table they define. All sizes are in elements, all index arithmetic is int64.
#pragma once

#include <stdint.h>

namespace compsparse {

enum class Activation : int32_t { none, relu, gelu, silu };

struct Range {
  int64_t begin;
  int64_t end;
};

// Half precision, by its bits.
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What numbers of a type are summed in.
template <typename T>
struct SumOf {
  using type = T;
};

template <>
struct SumOf<BFloat16> {
  using type = float;
};

template <>
struct SumOf<Float16> {
  using type = float;
};

template <typename T>
using Sum = typename SumOf<T>::type;

// Is a sum rounded when it is stored as T?
template <typename T>
constexpr bool narrows = sizeof(T) < sizeof(Sum<T>);

// Lanes of the widest vector of any table: panels whose vector axis is the batch have a multiple of it in rows.
constexpr int64_t batch_lanes = 16;

// block_sparse_linear

// y = act(x W^T + b). Block row r of W holds entries ptr[r]..ptr[r+1]; entry p sits in block column idx[p] and its
// values are values[slot[p]], stored [block_out, block_in], or [block_in, block_out] where `transposed`.
template <typename T>
struct BlockProduct {
  const T* x;       // [batch, in_features]
  const T* values;  // [num_slots, block_out * block_in]
  const T* bias;    // [out_features] or null
  T* y;             // [batch, out_features]
  const int64_t* ptr;
  const int32_t* idx;
  const int32_t* slot;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t block_out;
  int64_t block_in;
  bool transposed;
  Activation activation;
};

// For each entry p of block row r: blocks[slot[p]] = a[:, rows of r]^T b[:, columns of idx[p]]; or, where `sums` is not
// null, sums[p] is that, not yet rounded. Where `add`, it is added to what is there; only to what is not rounded.
template <typename T>
struct SampledBlocks {
  const T* a;              // [batch, out_features]
  const Sum<T>* b_panels;  // [block columns, panel_size(batch, block_in)], packed by `pack_panels`
  T* blocks;               // [num_entries, block_out * block_in]
  Sum<T>* sums;            // the same, or null
  const int32_t* slot;
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t block_out;
  int64_t block_in;
  bool add;
};

// Packed operands are elements of the size of a sum: one input, widened, or two of half that size.
// out = act(z), or grad * act'(z) where there is a gradient; gelu and silu.
template <typename T>
struct ActivatedValues {
  const T* z;
  const T* grad;  // or null
  T* out;
  Activation activation;
};

template <typename T>
struct BlockSparseKernels {
  // Weights as the product reads them: `packed_entry_size` elements an entry, or 0 where it reads them as stored.
  int64_t (*packed_entry_size)(const BlockProduct<T>&);
  void (*pack_weights)(const BlockProduct<T>&, Range entries, Sum<T>* packed);
  // One call computes y[batch, rows]; its scratch has `product_scratch` elements.
  int64_t (*product_scratch)(const BlockProduct<T>&);
  void (*product)(const BlockProduct<T>&, const Sum<T>* packed, Range rows, Range batch, Sum<T>* scratch);
  // Columns of blocks of b, one after another, each of `panel_size` elements, zero-padded.
  int64_t (*panel_size)(int64_t batch, int64_t block_in);
  void (*pack_panels)(const T* b, int64_t batch, int64_t in_features, int64_t block_in, Range batch_rows,
                      Sum<T>* panels);
  int64_t (*sampled_scratch)(const SampledBlocks<T>&);
  void (*sampled)(const SampledBlocks<T>&, Range rows, Sum<T>* scratch);
  // Where `sampled_uses_lanes`, not `sampled` but this: a panel holds the given features of `batch_rows` rows of a or b
  // as [features][batch_rows rounded up to batch_lanes], and its share of the sums is stored, or added to what is
  // there.
  bool (*sampled_uses_lanes)(const SampledBlocks<T>&);
  void (*pack_lanes)(const T* x, int64_t stride, int64_t batch_rows, Range features, Sum<T>* panel);
  void (*sampled_by_lanes)(const SampledBlocks<T>&, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t batch_rows,
                           bool add, Range rows);
  void (*activated)(const ActivatedValues<T>&, Range elements);
};

struct BlockSparseTable {
  BlockSparseKernels<float> f32;
  BlockSparseKernels<double> f64;
  BlockSparseKernels<BFloat16> bf16;
  BlockSparseKernels<Float16> f16;
};

extern const BlockSparseTable block_sparse_scalar, block_sparse_avx2, block_sparse_avx512;
extern const BlockSparseKernels<BFloat16> block_sparse_avx512_bf16;

// masked_linear

// A panel holds some batch rows of a matrix [batch, features] as [features][panel_width(rows)], so that the batch is
// the vector axis, in the type of their sums. A panel of width 1 is the batch row itself, packed only to widen it.

// y = x W^T + b. Row r of W (CSR) holds entries ptr[r]..ptr[r+1]; entry p sits in column idx[p].
template <typename T>
struct MaskedProduct {
  const Sum<T>* values;  // [nnz], in the order of the entries
  const Sum<T>* bias;    // [out_features] or null
  T* y;                  // [batch, out_features]
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
};

// sums[p] = sum over n of a[n, r] b[n, idx[p]], for the entries p of each row r.
template <typename S>
struct SampledSums {
  S* sums;  // [nnz]
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
};

template <typename T>
struct MaskedKernels {
  int64_t product_rows;  // batch rows of a full panel of the product
  int64_t sampled_rows;  // and of the sampled product
  int64_t (*panel_width)(int64_t rows);
  // The given features of `rows` batch rows of x, which are `stride` apart.
  void (*pack)(const T* x, int64_t stride, int64_t rows, Range features, Sum<T>* panel);
  // Outputs `rows` of the batch rows that the panel holds.
  void (*product)(const MaskedProduct<T>&, const Sum<T>* panel, Range batch, Range rows);
  // One panel's share of the sums: stored, or added to what is there.
  void (*sampled)(const SampledSums<Sum<T>>&, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t batch_rows,
                  bool add, Range rows);
  void (*round)(const Sum<T>* sums, Range entries, T* values);
};

struct MaskedTable {
  MaskedKernels<float> f32;
  MaskedKernels<double> f64;
  MaskedKernels<BFloat16> bf16;
  MaskedKernels<Float16> f16;
};

extern const MaskedTable masked_scalar, masked_avx2, masked_avx512;

// nm_linear

// An N:M pattern: row r has groups * n slots, and of each is stored which column of its group of m it lies in,
// ascending in the group: nm_bits(m) bits each, the first in the lowest bits of a byte, rows at whole bytes. Slots past
// the last column, in a ragged group, hold nothing.
struct NMPattern {
  const uint8_t* positions;  // [out_features, row_bytes]
  int64_t out_features;
  int64_t in_features;
  int64_t n;
  int64_t m;
};

constexpr int64_t nm_bits(int64_t m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }
constexpr int64_t nm_groups(const NMPattern& p) { return (p.in_features + p.m - 1) / p.m; }
constexpr int64_t nm_row_bytes(const NMPattern& p) { return (nm_groups(p) * p.n * nm_bits(p.m) + 7) / 8; }

// What outputs read of a chunk of at most 256 inputs. Output r has entries p = 0 .. counts[r], or count where counts is
// null: the value values[r * value_stride + p], and the input idx[r * idx_stride + p] of the chunk.
template <typename Value>
struct NMEntries {
  Value* values;
  const uint8_t* idx;
  const int32_t* counts;
  int64_t count;
  int64_t value_stride;
  int64_t idx_stride;
};

// A panel holds up to `rows` batch rows of a matrix [batch, features] as [features][width(batch rows)]. A panel of
// width 1 is the batch row itself, and is not packed.
template <typename T>
struct NMPanels {
  int64_t rows;
  int64_t (*width)(int64_t batch_rows);
  void (*pack)(const T* x, int64_t stride, int64_t batch_rows, Range features, T* panel);
};

template <typename T>
struct NMKernels {
  NMPanels<T> product_panels;
  NMPanels<T> sampled_panels;
  // Of some rows the slots in some groups, which begin at a whole byte, as entries idx[rows][slots]. The slots before
  // `counts[row]` lie in the weight; counts may be null where all do.
  void (*by_row)(const NMPattern&, Range rows, Range groups, uint8_t* idx, int32_t* counts);
  // Of the at most 256 columns of such groups the slots in at most 256 rows, as entries idx and ordered
  // [columns][rows].
  void (*by_column)(const NMPattern&, const T* values, Range groups, Range rows, uint8_t* idx, T* ordered,
                    int32_t* counts);
  // sums[r][width] of outputs r = 0 .. rows: added to what is there, or where `first` to the bias or 0.
  void (*accumulate)(const NMEntries<const T>&, const T* panel, int64_t width, int64_t rows, bool first, const T* bias,
                     T* sums);
  // sums[outputs rounded up to batch_lanes][width] to y [batch_rows][outputs], rows `stride` apart.
  void (*store)(const T* sums, int64_t width, int64_t batch_rows, int64_t outputs, int64_t stride, T* y);
  // y[columns of some groups] += x W, of one batch row; the groups begin at a whole byte.
  void (*scatter)(const NMPattern&, const T* values, const T* x, Range groups, T* y);
  // One panel's share of the values, which are the sums over the batch of a[output] b[input]: stored, or added to what
  // is there. Panels of a begin at the first output, panels of b at the chunk.
  void (*sampled)(const NMEntries<T>&, const T* a_panel, const T* b_panel, int64_t width, int64_t rows, bool add);
};

struct NMTable {
  NMKernels<float> f32;
  NMKernels<double> f64;
};

extern const NMTable nm_scalar, nm_avx2, nm_avx512;

// dag_network

// Everything between a network's input and its output is computed in the type of sums, T below: half precision is
// widened where it enters a tile, weights once a call, and results are rounded once.

// Nodes whose weights have one shape. Their gradients are summed in a buffer of all kinds: for each weight
// [fan_in + 1][gradient_width(out)], transposed, the bias last.
template <typename T>
struct DagKind {
  const T* weights;  // [num_weights, out, fan_in]
  const T* biases;   // [num_weights, out] or null
  int64_t num_weights;
  int64_t out;
  int64_t fan_in;
  int64_t gradient_offset;  // where the sums of this kind begin
  bool linear;
};

// A tile of the batch is `values` [columns][rows]: the channels of the sources, then of the nodes as they are executed.
template <typename T>
struct DagNodes {
  const DagKind<T>* kinds;
  const int32_t* nodes;      // [num_nodes, 4]: kind, weight, column, output column or -1
  const int32_t* edge_ptr;   // [num_nodes + 1]
  const int32_t* edges;      // [.., 3]: column, channels, where they stand in the fan-in
  const int32_t* child_ptr;  // [num_sources + num_nodes + 1]; null in the forward
  const int32_t* children;   // [.., 2]: node, where the vertex stands in its fan-in
  int64_t num_sources;       // in the backward
  int64_t num_nodes;
  int64_t in_features;
  int64_t out_features;
  Activation activation;
};

template <typename T>
struct DagNetwork {
  const T* x;     // [batch, in_features]
  T* y;           // [batch, out_features]; null in the backward
  const T* grad;  // [batch, out_features]; null in the forward
  T* grad_x;      // [batch, in_features] or null
  DagNodes<Sum<T>> graph;
};

// Of the weights [num_weights, out, fan_in] and, unless null, the biases [num_weights, out] of a kind.
template <typename T>
struct DagGradients {
  T* weights;
  T* biases;
};

template <typename T>
struct DagKernels {
  int64_t lanes;  // a tile has lanes, 2 lanes, .. max_vectors lanes rows
  int64_t max_vectors;
  int64_t (*gradient_width)(int64_t out);
  void (*widen)(const T* from, Range elements, Sum<T>* to);
  void (*forward)(const DagNetwork<T>&, Range batch, int64_t rows, Sum<T>* values);
  // `slopes` is as large as `values`, or null for relu, whose values tell; adds to the sums of the parameters'
  // gradients unless they are null.
  void (*backward)(const DagNetwork<T>&, Range batch, int64_t rows, Sum<T>* values, Sum<T>* slopes, Sum<T>* sums);
  // The sums of all parts, which are `stride` apart, to the gradients of some weights of a kind; overwrites the sums.
  void (*reduce)(const DagKind<Sum<T>>&, Sum<T>* sums, int64_t stride, int64_t parts, Range weights,
                 const DagGradients<T>&);
};

struct DagTable {
  DagKernels<float> f32;
  DagKernels<double> f64;
  DagKernels<BFloat16> bf16;
  DagKernels<Float16> f16;
};

extern const DagTable dag_scalar, dag_avx2, dag_avx512;

// threshold_attention

// A tensor [batch, heads, tokens, width] read through its strides; only the last dimension is contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t stride;  // of tokens
  T* head(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

struct AttentionSizes {
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;  // query head h reads key-value head h / (heads / kv_heads)
  int64_t queries;
  int64_t keys;
  int64_t width;  // of a query and of a key
  int64_t value_width;
};

// s_ij = scale q_i . k_j + bias_ij. Query i keeps key j where s_ij >= cut (absolute) or s_ij >= max_j s_ij + cut.
template <typename T>
struct Attention {
  AttentionSizes size;
  Heads<const T> query, key, value;
  Heads<T> out;
  const T* bias;        // float bias or null, strides in bias_strides (0 where it is broadcast)
  const uint8_t* mask;  // bool bias (true = may attend) or null, same strides
  int64_t bias_strides[4];
  const uint8_t* padding;  // [batch, keys], true = no query sees this key; or null
  const T* packed_keys;    // [batch, kv_heads, panels, width, panel_keys] by `pack_keys`
  const double* norms;     // [batch, kv_heads, panels]: the largest norm of a key in the panel
  double scale;
  double cut;
  bool absolute;
  bool causal;
};

// What one thread needs for a block of queries; kept keys of row r: columns[r * row_capacity ...], counts[r] of them.
template <typename T>
struct AttentionScratch {
  T* queries;        // [block_queries, width], scaled
  T* scores;         // [block_queries, score_stride]
  int64_t* counts;   // [block_queries]
  int32_t* columns;  // [block_queries, row_capacity]
  T* weights;        // [block_queries, row_capacity]
  int64_t row_capacity;
};

// The support of every query and the gradients that flow through it; row = (b * heads + h) * queries + i.
template <typename T>
struct AttentionGradient {
  AttentionSizes size;
  Heads<const T> query, key, value, grad;
  const int64_t* row_ptr;  // [rows + 1]
  const int32_t* col_idx;  // [nnz], ascending in each row
  const T* weights;        // [nnz]
  T* score_grad;           // [nnz]
  Heads<T> query_grad, key_grad, value_grad;
  double scale;
};

template <typename T>
struct AttentionKernels {
  int64_t panel_keys;     // keys side by side in a packed panel
  int64_t block_queries;  // most queries of one call of `forward`
  int64_t score_stride;
  int64_t slack;  // elements that `forward` may write past a row's last candidate
  void (*pack_keys)(const Attention<T>&, int64_t b, int64_t kv_head, Range panels, T* packed, double* norms);
  void (*forward)(const Attention<T>&, int64_t b, int64_t h, Range queries, const AttentionScratch<T>&);
  void (*backward_rows)(const AttentionGradient<T>&, Range rows);                              // score_grad, query_grad
  void (*backward_keys)(const AttentionGradient<T>&, int64_t b, int64_t kv_head, Range keys);  // key_grad, value_grad
};

struct AttentionTable {
  AttentionKernels<float> f32;
  AttentionKernels<double> f64;
};

extern const AttentionTable attention_scalar, attention_avx2, attention_avx512;

// proximal

enum class Penalty : int32_t { none, l1, group_l1, hard };

// What follows a step of an optimizer. `bound` is taken from a weight (l1) or, times the root of a group's size, from
// its norm; or it is the least weight that is kept (hard). Groups are blocks of the matrix [rows, columns]; those side
// by side in `panel` columns, a multiple of block_in, are done together. Panels are counted along the rows of blocks.
template <typename T>
struct ProximalMap {
  Penalty penalty;
  double bound;
  int64_t rows;
  int64_t columns;
  int64_t block_out;
  int64_t block_in;
  int64_t panel;
};

// param -= lr * d: d is the gradient with decay * param and sign * sign(param), or what momentum makes of it.
template <typename T>
struct SgdStep {
  T* param;
  const T* grad;
  T* buffer;  // or null: no momentum
  Sum<T> lr;
  Sum<T> momentum;
  Sum<T> share;  // of the gradient in the buffer
  Sum<T> decay;
  Sum<T> sign;
  bool nesterov;
  bool first;  // the buffer holds nothing yet
};

// param = keep * param - rate * mean / (sqrt(square) / root + eps)
template <typename T>
struct AdamWStep {
  T* param;
  const T* grad;
  T* mean;
  T* square;
  Sum<T> keep;
  Sum<T> rate;
  Sum<T> mean_share;  // of the gradient in the mean, of its square in the mean square
  Sum<T> square_keep;
  Sum<T> square_share;
  Sum<T> root;
  Sum<T> eps;
};

// Parameters and state are read and written once. `part` counts weights, or panels where the penalty has groups; then
// scratch has (block_out + 1) * panel numbers, squares has `panel`.
template <typename T>
struct ProximalKernels {
  void (*sgd)(const SgdStep<T>&, const ProximalMap<T>&, Range part, Sum<T>* scratch, double* squares);
  void (*adamw)(const AdamWStep<T>&, const ProximalMap<T>&, Range part, Sum<T>* scratch, double* squares);
};

struct ProximalTable {
  ProximalKernels<float> f32;
  ProximalKernels<double> f64;
  ProximalKernels<BFloat16> bf16;
  ProximalKernels<Float16> f16;
};

extern const ProximalTable proximal_scalar, proximal_avx2, proximal_avx512;

// Chosen once from cpuid, capped by the environment variable COMPSPARSE_CPU=scalar|avx2|avx512|avx512_bf16.
struct Kernels {
  const char* isa;
  const BlockSparseTable* block_sparse;
  const MaskedTable* masked;
  const DagTable* dag;
  const AttentionTable* attention;
  const NMTable* nm;
  const ProximalTable* proximal;
};

const Kernels& kernels();

}  // namespace compsparse
