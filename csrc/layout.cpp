// compsparse_kernels._layout: index arrays of sparse patterns, numpy in and out. compsparse_kernels/layouts/index.py is
// the only caller, and holds the same functions in numpy for builds without a compiler.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Non-zero bytes of one row, a word at a time: masks are mostly zeros.
template <class Visit>
void for_each_set(const uint8_t* row, int64_t columns, const Visit& visit) {
  int64_t c = 0;
  for (; c + 8 <= columns; c += 8) {
    uint64_t word;
    std::memcpy(&word, row + c, 8);
    if (word == 0) continue;
    for (int64_t i = c; i < c + 8; ++i)
      if (row[i]) visit(i);
  }
  for (; c < columns; ++c)
    if (row[c]) visit(c);
}

// bool [rows, columns] -> ptr int64 [rows + 1], idx int32 [nnz], columns ascending in each row
py::tuple compress(const Array<bool>& mask) {
  const int64_t rows = mask.shape(0), columns = mask.shape(1);
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask.data());
  Array<int64_t> ptr(rows + 1);
  int64_t* ends = ptr.mutable_data();
  ends[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t count = 0;
    for (int64_t c = 0; c < columns; ++c) count += bytes[r * columns + c] != 0;
    ends[r + 1] = ends[r] + count;
  }
  Array<int32_t> idx(ends[rows]);
  int32_t* out = idx.mutable_data();
  for (int64_t r = 0; r < rows; ++r)
    for_each_set(bytes + r * columns, columns, [&](int64_t c) { *out++ = static_cast<int32_t>(c); });
  return py::make_tuple(ptr, idx);
}

// The same pattern by columns: ptr int64 [columns + 1], idx int32 [nnz] (rows, ascending), and for each of its entries
// the position in the row order, of type P.
template <class P>
py::tuple transpose(const Array<int64_t>& ptr, const Array<int32_t>& idx, int64_t columns) {
  const int64_t rows = ptr.shape(0) - 1, nnz = idx.shape(0);
  Array<int64_t> column_ptr(columns + 1);
  Array<int32_t> row_idx(nnz);
  Array<P> perm(nnz);
  int64_t* ends = column_ptr.mutable_data();
  std::memset(ends, 0, sizeof(int64_t) * (columns + 1));
  for (int64_t e = 0; e < nnz; ++e) ++ends[idx.data()[e] + 1];
  for (int64_t c = 0; c < columns; ++c) ends[c + 1] += ends[c];
  std::vector<int64_t> next(ends, ends + columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = ptr.data()[r]; e < ptr.data()[r + 1]; ++e) {
      const int64_t at = next[idx.data()[e]]++;
      row_idx.mutable_data()[at] = static_cast<int32_t>(r);
      perm.mutable_data()[at] = static_cast<P>(e);
    }
  return py::make_tuple(column_ptr, row_idx, perm);
}

// bool [rows, columns] -> bool [ceil(rows / bo), ceil(columns / bi)]: does the block hold anything?
Array<bool> block_any(const Array<bool>& mask, int64_t bo, int64_t bi) {
  const int64_t rows = mask.shape(0), columns = mask.shape(1);
  const int64_t block_rows = (rows + bo - 1) / bo, block_columns = (columns + bi - 1) / bi;
  Array<bool> blocks({block_rows, block_columns});
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask.data());
  bool* out = blocks.mutable_data();
  std::memset(out, 0, block_rows * block_columns);
  for (int64_t r = 0; r < rows; ++r)
    for_each_set(bytes + r * columns, columns, [&](int64_t c) { out[r / bo * block_columns + c / bi] = true; });
  return blocks;
}

}  // namespace

PYBIND11_MODULE(_layout, m) {
  m.doc() = "Index arrays of sparse patterns; see compsparse_kernels/layouts/index.py.";
  m.def("compress", &compress, py::arg("mask"));
  m.def("transpose", &transpose<int32_t>, py::arg("ptr"), py::arg("idx"), py::arg("columns"));
  m.def("transpose_wide", &transpose<int64_t>, py::arg("ptr"), py::arg("idx"), py::arg("columns"));
  m.def("block_any", &block_any, py::arg("mask"), py::arg("block_out"), py::arg("block_in"));
}
