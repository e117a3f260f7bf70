// compsparse_kernels._C_cuda: importing it registers the CUDA kernels of every bind.cu with torch's dispatcher.
#include <Python.h>

namespace {

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
