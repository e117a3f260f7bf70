// N:M patterns to the entries of the CSR kernels. Of a slot only its column in its group is stored, packed; a call
// writes the columns out, by row or by column, which costs as much as one batch row of the product. So no second order
// is kept.
#pragma once

#include <stdint.h>

#include "../kernels.h"

namespace {

using namespace compsparse;

// Row r has groups * n slots; the column of each in its group is `bits` wide, the first in the lowest bits of a byte.
// Slots past the last column, in a group that is ragged, are no entries.
struct NMPattern {
  const uint8_t* positions;  // [out_features, row_bytes]
  int64_t out_features;
  int64_t in_features;
  int64_t groups;
  int64_t n;
  int64_t m;

  int64_t slots() const { return groups * n; }
  int64_t bits() const { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }
  int64_t row_bytes() const { return (slots() * bits() + 7) / 8; }
  const uint8_t* row(int64_t r) const { return positions + r * row_bytes(); }
  bool is_ragged() const { return groups * m != in_features; }
};

template <int Bits>
inline int32_t position_of(const uint8_t* row, int64_t slot) {
  return row[slot * Bits / 8] >> slot * Bits % 8 & ((1 << Bits) - 1);
}

// visit.template operator()<Bits>()
template <class Visit>
inline void with_bits(const NMPattern& pattern, const Visit& visit) {
  if (pattern.bits() == 2) return visit.template operator()<2>();
  if (pattern.bits() == 4) return visit.template operator()<4>();
  return visit.template operator()<8>();
}

// Entries of each row: positions ascend in a group, so what is past the last column is at the end of the row.
inline int64_t nm_row_entries(const NMPattern& pattern, int64_t r) {
  int64_t count = pattern.slots();
  with_bits(pattern, [&]<int Bits>() {
    const int64_t first = (pattern.groups - 1) * pattern.m;
    while (count > 0 && first + position_of<Bits>(pattern.row(r), count - 1) >= pattern.in_features) --count;
  });
  return count;
}

// ptr[0 .. out_features], the offsets of the entries by row.
inline void nm_row_offsets(const NMPattern& pattern, int64_t* ptr) {
  ptr[0] = 0;
  for (int64_t r = 0; r < pattern.out_features; ++r)
    ptr[r + 1] = ptr[r] + (pattern.is_ragged() ? nm_row_entries(pattern, r) : pattern.slots());
}

// The columns of the entries of some rows, to idx[ptr[r]] and after; `bases` is the first column of each slot's group.
inline void nm_columns(const NMPattern& pattern, const int64_t* ptr, const int32_t* bases, Range rows, int32_t* idx) {
  with_bits(pattern, [&]<int Bits>() {
    constexpr int64_t PerByte = 8 / Bits;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const uint8_t* row = pattern.row(r);
      int32_t* out = idx + ptr[r];
      const int64_t count = ptr[r + 1] - ptr[r];
      int64_t s = 0;
      for (; s + PerByte <= count; s += PerByte)
        for (int64_t k = 0; k < PerByte; ++k)
          out[s + k] = bases[s + k] + (row[s / PerByte] >> k * Bits & ((1 << Bits) - 1));
      for (; s < count; ++s) out[s] = bases[s] + position_of<Bits>(row, s);
    }
  });
}

// The entries of the columns of some groups, by column and then by row: offsets, rows and values. `next` holds the
// m * (groups.end - groups.begin) columns' counts, then their next places. All groups before these are whole.
template <typename T>
void nm_by_column(const NMPattern& pattern, const T* values, Range groups, int64_t* next, int64_t* ptr, int32_t* idx,
                  T* ordered) {
  const int64_t n = pattern.n, m = pattern.m, first = groups.begin * m;
  const int64_t columns = (groups.end - groups.begin) * m;
  const int64_t inside = first + columns < pattern.in_features ? columns : pattern.in_features - first;
  with_bits(pattern, [&]<int Bits>() {
    const auto for_each_slot = [&](const auto& visit) {
      for (int64_t r = 0; r < pattern.out_features; ++r) {
        const uint8_t* row = pattern.row(r);
        for (int64_t g = groups.begin; g < groups.end; ++g)
          for (int64_t s = g * n; s < (g + 1) * n; ++s) visit(r, s, (g - groups.begin) * m + position_of<Bits>(row, s));
      }
    };
    for (int64_t c = 0; c < columns; ++c) next[c] = 0;
    for_each_slot([&](int64_t, int64_t, int64_t c) { ++next[c]; });
    int64_t place = pattern.out_features * n * groups.begin;
    for (int64_t c = 0; c < inside; ++c) {
      const int64_t count = next[c];
      ptr[first + c] = next[c] = place;
      place += count;
    }
    ptr[first + inside] = place;  // the next column's, which says so too, or the end
    for_each_slot([&](int64_t r, int64_t s, int64_t c) {
      if (c >= inside) return;
      const int64_t p = next[c]++;
      idx[p] = static_cast<int32_t>(r);
      ordered[p] = values[r * pattern.slots() + s];
    });
  });
}

}  // namespace
