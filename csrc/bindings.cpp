// pybind11 module _C: the CPU kernels as plain functions. The GIL is released while a kernel runs.
#include <sys/mman.h>

#include "casters.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pybind11::detail {

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

// The Python function takes the fields of Args in order, the last of them the number of threads.
template <class Args, class... Field>
void def(py::module_& m, const char* name, Fault (*KernelTable::*kernel)(const Args&),
         Fields<Field...>) {
  m.def(name, [kernel](Field... fields, i64 threads) {
    const Args args{fields..., threads};
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
  m.attr("cuda_off") = PPOK_CUDA_OFF;  // why the module _cuda was not built, or empty
  m.def("isa", [] { return std::string(active().isa); });
  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa);
  m.def("is_intel", &is_intel);
  m.def("advise_huge_pages", &advise_huge_pages);
  active();  // an unusable PPO_KERNELS_CPU_ISA fails at import, where the package reports it

#define PPOK_DEF(name, Args) def(m, #name, &KernelTable::name, FieldsOf<Args>::type{});
  PPOK_KERNELS(PPOK_DEF)
}
