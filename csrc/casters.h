// How the arguments of a Python function become the argument structs of kernels.h, for every module
// of kernels. A tensor is a tuple (data_ptr, dtype code, strides...) or None.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace pybind11::detail {

template <>
struct type_caster<ppok::View> {
  PYBIND11_TYPE_CASTER(ppok::View, const_name("tuple[int, ...] | None"));
  bool load(handle source, bool) {
    value = ppok::View{};
    if (source.is_none()) return true;
    PyObject* tuple = source.ptr();
    if (!PyTuple_Check(tuple)) return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(tuple);
    if (size < 2 || size > 5) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
    value.dtype = static_cast<int32_t>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 1)));
    for (Py_ssize_t i = 2; i < size; ++i)
      value.stride[i - 2] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    return PyErr_Occurred() ? (PyErr_Clear(), false) : true;
  }
};

// The fields of the setting in order, as one tuple.
template <>
struct type_caster<ppok::ScanSetting> {
  PYBIND11_TYPE_CASTER(ppok::ScanSetting, const_name("tuple"));
  using Fields =
      std::tuple<ppok::View, ppok::View, ppok::View, ppok::View, ppok::View, ppok::View, int64_t,
                 int64_t, int64_t, int64_t, int64_t, double, double, double, int64_t>;
  bool load(handle source, bool convert) {
    make_caster<Fields> fields;
    if (!fields.load(source, convert)) return false;
    value = std::apply([](auto... field) { return ppok::ScanSetting{field...}; },
                       cast_op<Fields>(fields));
    return true;
  }
};

}  // namespace pybind11::detail

namespace ppok {

// The types of a struct's fields in order, but for the last, which is each module's own.
template <class... T>
struct Fields {};
template <class Args>
struct FieldsOf;

#define PPOK_FIELDS(Args, ...)        \
  template <>                         \
  struct FieldsOf<Args> {             \
    using type = Fields<__VA_ARGS__>; \
  }
using i64 = int64_t;
PPOK_FIELDS(LogprobForward, View, View, View, View, i64, i64, i64, i64, double, double, double,
            View, View, View);
PPOK_FIELDS(LogprobBackward, View, View, View, View, View, View, View, View, i64, i64, i64, i64,
            double, double, double, View);
PPOK_FIELDS(PpoRows, View, View, View, View, View, View, View, View, View, i64, i64, i64, i64,
            double, double, double, i64, double, double, double, double, i64, double, double, View,
            View, View);
PPOK_FIELDS(KeptForward, View, View, View, View, View, View, View, i64, i64, i64, i64, i64, double,
            double, double, View, View, View, View);
PPOK_FIELDS(KeptBackward, View, View, View, View, View, View, View, View, View, View, View, View,
            i64, i64, i64, i64, i64, double, double, double, View);
PPOK_FIELDS(ScanForward, View, View, View, View, ScanSetting, View, View);
PPOK_FIELDS(VTrace, View, View, double, double, double, View, View, View, View, ScanSetting, View,
            View);
PPOK_FIELDS(ScanBackward, View, View, ScanSetting, View, View, View, View);
PPOK_FIELDS(CategoricalKlForward, View, View, View, i64, i64, i64, double, View, View);
PPOK_FIELDS(CategoricalKlBackward, View, View, View, View, View, View, i64, i64, i64, bool, double,
            View);
// These end with the fields of LossFrame.
PPOK_FIELDS(ClippedLoss, View, View, View, bool, i64, double, double, double, double, View, View,
            View, i64, i64, i64, i64, double, double, View, View, View);
PPOK_FIELDS(ValueLoss, View, View, View, double, double, View, View, View, i64, i64, i64, i64,
            double, double, View, View, View);
PPOK_FIELDS(ImportanceWeights, View, View, i64, double, double, View, View, View, i64, i64, i64,
            i64, double, double, View, View, View);
PPOK_FIELDS(ScaleGradient, View, View, i64, View);
PPOK_FIELDS(MaskedReduce, View, View, i64, i64, i64, bool, bool, View, View);
PPOK_FIELDS(MomentsForward, View, View, i64, i64, View);
PPOK_FIELDS(WhitenForward, View, View, View, bool, i64, i64, bool, bool, double, View);
PPOK_FIELDS(WhitenBackward, View, View, View, View, i64, i64, bool, bool, double, View);
PPOK_FIELDS(KlForward, View, View, View, i64, i64, i64, double, View);
PPOK_FIELDS(KlBackward, View, View, View, View, i64, i64, i64, double, View);
PPOK_FIELDS(ShapeRewards, View, View, View, View, View, View, i64, i64, i64, i64, double, double,
            View, View, View);
#undef PPOK_FIELDS

}  // namespace ppok
