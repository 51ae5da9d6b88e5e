"""What Dynamo does not trace by itself in networks that people run, made traceable while a graph is captured.

None of this changes what is computed: a message is said once, while the model is captured; a size that went through an
integer tensor stays a size; hints that only choose a kernel are taken as not given.
"""

from __future__ import annotations

import logging
import operator
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._dynamo import exc, symbolic_convert, trace_rules
from torch._dynamo.bytecode_transformation import create_call_function
from torch._dynamo.source import ChainedSource, LocalSource
from torch._dynamo.variables import (
    ConstantVariable,
    TensorVariable,
    UserFunctionVariable,
    UserMethodVariable,
    VariableTracker,
    builder,
    misc,
    user_defined,
)
from torch._dynamo.variables.ctx_manager import NullContextVariable
from torch._dynamo.variables.tensor import NumpyNdarrayVariable
from torch._subclasses import fake_tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.modules import transformer
from torch.utils.checkpoint import checkpoint_sequential

from jvpgraph.sizes_in_tensors import KNOWN_NUMBERS, numbers_of, variable_of

__all__ = ["TRACED", "flex_on_any_device", "taught"]

SAYS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "log")
SAYERS = {
    *(print, warnings.warn, logging.getLogger, *(getattr(logging, name) for name in SAYS if name != "warn")),
    *(getattr(logging.Logger, name) for name in (*SAYS, "isEnabledFor", "getEffectiveLevel")),
}
# Settings of Dynamo's, where this version has them. What a block keeps while it runs under a checkpoint (a table that
# grows, features for a loss) is kept by the forward; the backward does not keep it once more.
SETTINGS = {
    "trace_autograd_ops": True,
    "allow_rnn": True,  # written out step by step
    "ignore_logging_functions": SAYERS,
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
}
TRACED: dict[str, Any] = {name: value for name, value in SETTINGS.items() if hasattr(torch._dynamo.config, name)}
MISSING = object()
ITEMS: dict[Any, Callable[..., Any]] = {
    dict.__getitem__: lambda self, name: self[name],
    dict.get: lambda self, name: self.get(name),
}
CHECKPOINTS = checkpoint_sequential.__code__.co_filename
LOCKS = (type(threading.Lock()), type(threading.RLock()))


@contextmanager
def taught() -> Iterator[None]:
    """Dynamo, with what it is taught here."""
    present = [entry for entry in TAUGHT if entry[0] is not None]  # older versions lack some of them
    before = [(owner, name, vars(owner).get(name, MISSING)) for owner, name, _ in present]
    for owner, name, new in present:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in before:
            delattr(owner, name) if old is MISSING else setattr(owner, name, old)


def flex_on_any_device() -> AbstractContextManager[Any]:
    """flex_attention refuses inputs with gradients on CPUs; the op that takes its place has a backward there."""
    return mock.patch.object(flex_attention, "_validate_device", _any_device)


# ------------------------------------------------------------------------------------------------- messages


def _say(self: Any, tx: Any, args: Any, kwargs: Any) -> VariableTracker:
    """What a model prints, warns of or logs is said now, if its words are known now."""
    return _said(self.value, tx, args, kwargs)


def _attribute_of_logger(self: Any, tx: Any, name: str) -> VariableTracker:
    found = getattr(self.value, name, None)
    if isinstance(found, (str, int)):
        return ConstantVariable.create(found)
    return _getattr_of_variable(self, tx, name)


def _of_logger(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
    return _said(getattr(self.value, name), tx, args, kwargs)


def _said(say: Callable[..., Any], tx: Any, args: Any, kwargs: Any) -> VariableTracker:
    try:
        words = [x.as_python_constant() for x in args]
        how = {name: x.as_python_constant() for name, x in kwargs.items()}
    except Exception:  # a tensor or a symbolic size, in as many ways as there are variables
        return ConstantVariable.create(None)
    if say is not warnings.warn:
        found = say(*words, **how)
        return (
            misc.LoggingLoggerVariable(found) if isinstance(found, logging.Logger) else ConstantVariable.create(found)
        )
    try:
        kind = how.get("category", words[1] if len(words) > 1 else None) or UserWarning
        warnings.warn_explicit(words[0] if words else how["message"], kind, tx.f_code.co_filename, tx.lineno or 1)
    except Warning as raised:
        exc.raise_observed_exception(type(raised), tx, args=list(raised.args))
    return ConstantVariable.create(None)


# -------------------------------------------------------------------------------- numbers that become tensors


def _read(method: Callable[..., Any], one: bool = False) -> Callable[..., Any]:
    """``item`` or ``tolist``: the sizes themselves, where a tensor was made of sizes."""

    def read(self: Any, tx: Any, *args: Any, **kwargs: Any) -> VariableTracker:
        numbers = numbers_of(tx, self.as_proxy().node)
        if numbers is None or (one and numbers.size != 1):
            return method(self, tx, *args, **kwargs)
        return variable_of(tx, (numbers.reshape(()) if one else numbers).tolist())

    return read


class _DType(misc.NumpyDTypeVariable):
    """A dtype that comes from no variable of the model, and can be part of a key that it keeps."""

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from("numpy", "dtype"))
        codegen.append_output(codegen.create_load_const(self.value.name))
        codegen.extend_output(create_call_function(1, False))


def _same_dtype(self: Any, other: Any) -> bool:
    return isinstance(other, misc.NumpyDTypeVariable) and self.value == other.value


def _attribute_of_array(self: Any, tx: Any, name: str) -> VariableTracker:
    if name != "dtype":
        return _getattr_of_array(self, tx, name)
    return _DType(np.dtype(torch._numpy.ndarray(_example(self)).dtype.name))


def _method_of_array(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
    constant = getattr(_example(self), "constant", None)
    if name not in ("tobytes", "tostring") or constant is None or args or kwargs:
        return _call_method_of_array(self, tx, name, args, kwargs)
    return ConstantVariable.create(constant.numpy().tobytes())


def _example(variable: Any) -> Any:
    return variable.as_proxy().node.meta["example_value"]


# --------------------------------------------------------------------------------------------- Python's own


def _method_of_context(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
    """What a backward deletes from its context is not asked for any more."""
    if name == "__delattr__":
        return ConstantVariable.create(None)
    return _call_method_of_context(self, tx, name, args, kwargs)


def _import(name: str, **how: Any) -> Any:
    """Dynamo's own import: a module that is not there raises ImportError where the model may catch it."""
    try:
        return __import__(name, **how)
    except ImportError as error:
        translator = sys._getframe(1).f_locals["self"]
        exc.raise_observed_exception(type(error), translator, args=[str(error)])


def _is_assert(self: Any, truth_fn: Any, push: bool) -> bool:
    """An assertion whose message is made of something gets the line as its message: graphs have no text in them."""
    if _detect_assert(self, truth_fn, push):
        return True
    start, target = self.instruction_pointer, self.current_instruction.target
    last = next((i for i, inst in enumerate(self.instructions) if inst is target), 0) - 1
    raises = start < last and self.instructions[last].opname == "RAISE_VARARGS"
    first = self.instructions[start]
    what = first.opname == "LOAD_ASSERTION_ERROR" or (first.opname == "LOAD_COMMON_CONSTANT" and not first.arg)
    if push or truth_fn is not operator.truth or not raises or not what:
        return False
    self.push(ConstantVariable.create(f"assertion failed in {self.f_code.co_name}, line {self.lineno}"))
    return True


def _source_of_method(self: Any, tx: Any, name: str) -> Any:
    """Of what ``torch.compile`` wraps, where a method is decorated with it: the guards ask for its defaults."""
    source: Any = _by_mro(self, tx, name)
    found: Any = next((vars(kind)[name] for kind in type(self.value).__mro__ if name in vars(kind)), None)
    while "_torchdynamo_inline" in getattr(found, "__dict__", {}):
        found, source = found._torchdynamo_inline, user_defined.AttrSource(source, "_torchdynamo_inline")
    return source


def _enter(self: Any, inst: Any) -> None:
    """A lock, such as functools.cached_property has before Python 3.12, is for Python; a graph has no use for it."""
    if isinstance(getattr(self.stack[-1].realize(), "value", None), LOCKS):
        self.stack[-1] = NullContextVariable()
    _before_with(self, inst)


def _by_item(self: Any) -> Any:
    """``__getattr__ = dict.__getitem__``, as dictionaries of settings have it, as a function of Python's."""
    found = _find_getattr(self)
    return ITEMS.get(found, found) if isinstance(found, types.MethodDescriptorType) else found


def _look_up(obj: Any, name: str | None = None, filename: str | None = None, **how: Any) -> Any:
    """checkpoint_sequential is traced like what it calls; the rest of its file is left to Dynamo."""
    if obj is None:  # a function with a closure, of which Dynamo has name and file alone
        of_sequential = (filename, name) == (CHECKPOINTS, "forward")
    else:
        file = getattr(getattr(obj, "__code__", None), "co_filename", None)
        of_sequential = file == CHECKPOINTS and obj.__qualname__.startswith("checkpoint_sequential")
    if not of_sequential:
        return _lookup_inner(obj, name, filename, **how)
    if how.get("reasons") is not None:
        how["reasons"].add("it only calls checkpoint")
    return UserFunctionVariable


def _calls_itself(attribute: Callable[..., Any]) -> Callable[..., Any]:
    """``f.__call__`` of a function or method is f: checkpoints are handed ``block.__call__`` and call that."""

    def get(self: Any, tx: Any, name: str) -> VariableTracker:
        found: VariableTracker = self if name == "__call__" else attribute(self, tx, name)
        return found

    return get


def _float(self: Any, value: float) -> VariableTracker:
    """A float that nobody passed, a module's eps or a default, is a number until it is seen to change, as ints are.

    One that is an input of the graph is read outside of the body, a checkpoint's, that asks for it first: the others
    ask for it too.
    """
    kind, tracers = self.source.guard_source, self.tx.output.tracers
    of_module = (kind() if callable(kind) else kind).is_unspecialized_nn_module()  # a method in older versions
    base = self.source.get_base() if isinstance(self.source, ChainedSource) else self.source
    passed = isinstance(base, LocalSource) and not of_module
    bodies = tracers[1:]
    del tracers[1:]
    try:
        with nullcontext() if passed else torch._dynamo.config.patch(assume_static_by_default=True):
            found: VariableTracker = _wrap_float(self, value)
    finally:
        tracers += bodies
    return found


# ------------------------------------------------------------------------------------------- hints and checks


def _sdp_kernel(
    enable_flash: bool = True, enable_math: bool = True, enable_mem_efficient: bool = True, enable_cudnn: bool = True
) -> Any:
    """torch.backends.cuda.sdp_kernel, by its successor."""
    backends = []
    if enable_flash:
        backends.append(SDPBackend.FLASH_ATTENTION)
    if enable_mem_efficient:
        backends.append(SDPBackend.EFFICIENT_ATTENTION)
    if enable_math:
        backends.append(SDPBackend.MATH)
    if enable_cudnn:
        backends.append(SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(backends)


def _is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether the caller says that the mask is causal, which is only a hint: the mask holds either way."""
    return is_causal is True


def _any_device(query: Tensor, key: Tensor, value: Tensor) -> None:
    """flex_attention has no backward on CPUs; the op that takes its place has one."""


_getattr_of_array = NumpyNdarrayVariable.var_getattr
_call_method_of_array = NumpyNdarrayVariable.call_method
_getattr_of_variable = misc.LoggingLoggerVariable.var_getattr
_call_method_of_context = misc.AutogradFunctionContextVariable.call_method
_wrap_float = builder.VariableBuilder.wrap_symfloat
_detect_assert = symbolic_convert._detect_and_normalize_assert_statement
_by_mro: Any = getattr(user_defined.UserDefinedObjectVariable, "get_source_by_walking_mro", None)

_before_with = symbolic_convert.InstructionTranslatorBase.setup_or_before_with
_find_getattr = user_defined.UserDefinedObjectVariable._check_for_getattr
_lookup_inner = trace_rules._lookup_inner

TAUGHT: list[tuple[Any, str, Any]] = [
    (fake_tensor, "CONSTANT_NUMEL_LIMIT", KNOWN_NUMBERS),
    (getattr(misc, "IgnoredFunctionVariable", None), "call_function", _say),
    (misc.LoggingLoggerVariable, "call_method", _of_logger),
    (TensorVariable, "method_tolist", _read(TensorVariable.method_tolist)),
    (TensorVariable, "method_item", _read(TensorVariable.method_item, one=True)),
    (misc.NumpyDTypeVariable, "is_python_equal", _same_dtype),
    (NumpyNdarrayVariable, "var_getattr", _attribute_of_array),
    (NumpyNdarrayVariable, "call_method", _method_of_array),
    (symbolic_convert, "__import__", _import),
    (misc.LoggingLoggerVariable, "var_getattr", _attribute_of_logger),
    (misc.AutogradFunctionContextVariable, "call_method", _method_of_context),
    (builder.VariableBuilder, "wrap_symfloat", _float),
    *((kind, "var_getattr", _calls_itself(kind.var_getattr)) for kind in (UserFunctionVariable, UserMethodVariable)),
    (symbolic_convert.InstructionTranslatorBase, "setup_or_before_with", _enter),
    (user_defined.UserDefinedObjectVariable, "_check_for_getattr", _by_item),
    (trace_rules, "_lookup_inner", _look_up),
    (symbolic_convert, "_detect_and_normalize_assert_statement", _is_assert),
    (_by_mro and user_defined.UserDefinedObjectVariable, "get_source_by_walking_mro", _source_of_method),
    (torch.backends.cuda, "sdp_kernel", _sdp_kernel),
    (transformer, "_detect_is_causal_mask", _is_causal),
    (flex_attention, "_validate_device", _any_device),
]
