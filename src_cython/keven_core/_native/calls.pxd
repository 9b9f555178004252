"""What both engines (consumer.pyx, flow.pyx) call of CPython and C in their loops."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *value)
    PyObject *PyBytes_FromStringAndSize_raw "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size)
    void PyErr_Fetch(PyObject **type, PyObject **value, PyObject **traceback)
    void PyErr_NormalizeException(PyObject **type, PyObject **value, PyObject **traceback)
    void PyErr_SetObject(object type, object value)
    int PyException_SetTraceback(PyObject *value, PyObject *traceback)
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1

cdef extern from *:
    """
    #include <time.h>

    /* The first 256 bytes of a value that is decoded soon. */
    static inline void keven_prefetch_value(const void *value) {
        for (int line = 0; line < 4; line++) __builtin_prefetch((const char *)value + 64 * line, 0, 3);
    }

    static inline int64_t keven_now_ms(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }

    #define KEVEN_CONVENTION (METH_VARARGS | METH_FASTCALL | METH_NOARGS | METH_O | METH_KEYWORDS | METH_METHOD)
    typedef PyObject *(*keven_fastcall)(PyObject *, PyObject *const *, Py_ssize_t);

    /* callable(arg) without the detours that PyObject_CallOneArg takes to it: a bound method's function is called with
       its self (the handler), a C method by its pointer (the decoder). Anything else goes the usual way. */
    static inline PyObject *keven_call(PyObject *callable, PyObject *arg) {
        PyObject *args[3] = {NULL, NULL, arg};
        if (PyMethod_Check(callable)) {
            PyObject *function = PyMethod_GET_FUNCTION(callable);
            vectorcallfunc call = PyVectorcall_Function(function);
            if (call != NULL) {
                args[1] = PyMethod_GET_SELF(callable);
                return call(function, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
            }
        } else if (PyCFunction_CheckExact(callable)
                   && (PyCFunction_GET_FLAGS(callable) & KEVEN_CONVENTION) == METH_FASTCALL) {
            keven_fastcall call = (keven_fastcall)(void (*)(void))PyCFunction_GET_FUNCTION(callable);
            return call(PyCFunction_GET_SELF(callable), args + 2, 1);
        }
        return PyObject_CallOneArg(callable, arg);
    }
    """
    void keven_prefetch_value(const void *value) nogil
    int64_t keven_now_ms() nogil
    PyObject *keven_call(PyObject *callable, PyObject *arg)
