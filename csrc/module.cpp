// compsparse_kernels._C: importing it registers the CPU kernels of every bind.cpp with torch's dispatcher.
// The schemas live in compsparse_kernels/ops/*/contract.py. Python's limited API and LibTorch's stable ABI only, so one
// binary serves later versions of both.
#include <Python.h>

#include "cpu/kernels.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(compsparse::kernels().isa); }

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "Name of the instruction set whose kernels run: scalar, avx2, avx512 or avx512_bf16."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
