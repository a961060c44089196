// pybind11 module _cuda: the CUDA kernels as plain functions, which return before the kernel ends.
// The emulator of the tests builds the same under another name.
#include "casters.h"
#include "cuda/launchers.h"

namespace py = pybind11;

namespace {

using namespace ppok;

// The Python function takes the fields of Args in order, but for the number of threads, then
// (stream, address of the fault, multiprocessors, allocate), where allocate(bytes) gives a tensor.
template <class Args, class... Field>
void def(py::module_& m, const char* name, const char* (*launcher)(const Args&, const Launch&),
         int64_t (*workspace_of)(const Args&), Fields<Field...>) {
  m.def(name, [=](Field... fields, const py::tuple& target) {
    const Args args{fields..., 0};
    Launch to{PyLong_AsVoidPtr(target[0].ptr()),
              static_cast<int64_t*>(PyLong_AsVoidPtr(target[1].ptr())), nullptr, 0,
              target[2].cast<int64_t>()};
    py::object workspace;
    if (const int64_t bytes = workspace_of(args)) {
      workspace = target[3](bytes);
      to.workspace = PyLong_AsVoidPtr(workspace.attr("data_ptr")().ptr());
      to.workspace_bytes = bytes;
    }
    const char* error;
    {
      py::gil_scoped_release release;
      error = launcher(args, to);
    }
    if (error) throw std::runtime_error(std::string(name) + " on CUDA: " + error);
  });
}

}  // namespace

PYBIND11_MODULE(PPOK_MODULE, m) {
  m.attr("compiler") = PPOK_COMPILER;
  m.attr("architectures") = PPOK_ARCHITECTURES;
  using namespace PPOK_ISA;
#define PPOK_DEF(name, Args) \
  def(m, #name, &PPOK_ISA::name, &PPOK_ISA::name##_workspace, FieldsOf<Args>::type{});
  PPOK_KERNELS(PPOK_DEF)
  m.def("ppo_rows_fit", &PPOK_ISA::ppo_rows_fit);
}
