// pybind11 module _C: the kernels as plain functions. Tensors come as tuples (data_ptr, dtype code,
// strides...) or None; ppo_kernels/cpu makes them. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include "cpu/isa.h"
#include "kernels.h"

namespace py = pybind11;

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

template <>
struct type_caster<ppok::Fault> {
  PYBIND11_TYPE_CASTER(ppok::Fault, const_name("tuple[int, int] | None"));
  static handle cast(const ppok::Fault& fault, return_value_policy, handle) {
    if (fault.kind == ppok::kNoFault) return none().release();
    return make_tuple(fault.kind, fault.where).release();
  }
};

}  // namespace pybind11::detail

namespace {

using namespace ppok;

// The Python function takes the fields of Args in order; Fields... spells their types.
template <class Args, class... Fields>
void def(py::module_& m, const char* name, Fault (*KernelTable::*kernel)(const Args&)) {
  m.def(name, [kernel](Fields... fields) {
    const Args args{fields...};
    py::gil_scoped_release release;
    return (active().*kernel)(args);
  });
}

// A fresh tensor of hundreds of megabytes is mostly page faults: 2 MiB pages make them 512 times
// fewer. A hint: where the system has none to give, nothing changes.
void advise_huge_pages(uintptr_t begin, uintptr_t bytes) {
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PPOK_VERSION;
  m.attr("compiler") = PPOK_COMPILER;
  m.attr("openmp") = static_cast<bool>(PPOK_OPENMP);
  m.def("isa", [] { return std::string(active().isa); });
  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa);
  m.def("advise_huge_pages", &advise_huge_pages);
  active();  // an unusable PPO_KERNELS_CPU_ISA fails at import, where the package reports it

  using i64 = int64_t;
  def<LogprobForward, View, View, View, View, i64, i64, i64, i64, double, double, double, View,
      View, View, i64>(m, "logprob_forward", &KernelTable::logprob_forward);
  def<LogprobBackward, View, View, View, View, View, View, View, View, i64, i64, i64, i64, double,
      double, double, View, i64>(m, "logprob_backward", &KernelTable::logprob_backward);
  def<ScanForward, View, View, View, View, ScanSetting, View, View, i64>(
      m, "scan_forward", &KernelTable::scan_forward);
  def<ScanBackward, View, View, ScanSetting, View, View, View, View, i64>(
      m, "scan_backward", &KernelTable::scan_backward);
  // Both losses end with the fields of LossFrame.
  def<ClippedLoss, View, View, View, bool, i64, double, double, double, double, View, View, View,
      i64, i64, i64, i64, double, double, View, View, View, i64>(m, "clipped_loss",
                                                                 &KernelTable::clipped_loss);
  def<ValueLoss, View, View, View, double, double, View, View, View, i64, i64, i64, i64, double,
      double, View, View, View, i64>(m, "value_loss", &KernelTable::value_loss);
  def<ScaleGradient, View, View, i64, View, i64>(m, "scale_gradient", &KernelTable::scale_gradient);
  def<MaskedReduce, View, View, i64, i64, i64, bool, bool, View, View, i64>(
      m, "masked_reduce", &KernelTable::masked_reduce);
  def<MomentsForward, View, View, i64, i64, View, i64>(m, "moments", &KernelTable::moments);
  def<WhitenForward, View, View, View, i64, i64, bool, bool, double, View, i64>(
      m, "whiten", &KernelTable::whiten);
  def<WhitenBackward, View, View, View, View, i64, i64, bool, bool, double, View, i64>(
      m, "whiten_backward", &KernelTable::whiten_backward);
  def<KlForward, View, View, View, i64, i64, i64, double, View, i64>(m, "kl_forward",
                                                                     &KernelTable::kl_forward);
  def<KlBackward, View, View, View, View, i64, i64, i64, double, View, i64>(
      m, "kl_backward", &KernelTable::kl_backward);
  def<CategoricalKlForward, View, View, View, i64, i64, i64, double, View, View, i64>(
      m, "categorical_kl_forward", &KernelTable::categorical_kl_forward);
  def<CategoricalKlBackward, View, View, View, View, View, View, i64, i64, i64, bool, double, View,
      i64>(m, "categorical_kl_backward", &KernelTable::categorical_kl_backward);
  def<ShapeRewards, View, View, View, View, View, i64, i64, i64, i64, double, double, View, View,
      View, i64>(m, "shape_rewards", &KernelTable::shape_rewards);
}
