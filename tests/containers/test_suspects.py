"""What real checkpoints hold is let through; what reaches for the machine is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import itertools
import logging
import operator
import pathlib
import pickle
import random
import re
import types
import typing
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ensemblekit.containers import Extent, Unusable, pickle_vm
from ensemblekit.containers.suspects import verdict
from ensemblekit.errors import HostileError

from ..faults.forge import Code, call, named, newobj, pickled


def load(data: bytes) -> Any:
    def no_storage(key: str, nbytes: int, *_: int) -> Extent | Unusable:
        return Unusable(f"lies in storage {key} of {nbytes} bytes")

    return pickle_vm.load(data, where="file", storage=no_storage)


class Phase(enum.Enum):
    TRAIN = "train"


class Level(enum.IntEnum):
    LOW = 1


class Options(enum.Flag):
    A = 1
    B = 2


Point = collections.namedtuple("Point", "x y")  # as people write it


def harmless(x: float, *, scale: float = 1.0) -> float:
    return x * scale


class Scheduler:
    """Keeps a bound method, as LambdaLR and callbacks do."""

    def rate(self) -> float:
        return 0.1


BENIGN: dict[str, Callable[[], Any]] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, kind=int, path=pathlib.Path("x")),
    "simple-namespace": lambda: types.SimpleNamespace(a=1),
    "numpy-float64": lambda: np.float64(0.5),
    "numpy-float32": lambda: np.float32(0.5),
    "numpy-int64": lambda: np.int64(3),
    "numpy-bool": lambda: np.bool_(True),
    "numpy-str": lambda: np.str_("x"),
    "numpy-array": lambda: np.arange(6.0).reshape(2, 3),
    "numpy-object-array": lambda: np.array([None, "a"], dtype=object),
    "numpy-dtype": lambda: np.dtype("float32"),
    "numpy-datetime": lambda: np.datetime64("2024-01-01"),
    "numpy-state": lambda: ("MT19937", np.arange(4, dtype=np.uint32), 4, 0, 0.0),
    "path": lambda: pathlib.Path("a/b"),
    "pure-windows-path": lambda: pathlib.PureWindowsPath("c:/x"),
    "datetime": lambda: datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "date": lambda: datetime.date(2024, 1, 2),
    "timedelta": lambda: datetime.timedelta(seconds=3),
    "enum": lambda: Phase.TRAIN,
    "int-enum": lambda: Level.LOW,
    "flag": lambda: Options.A | Options.B,
    "enum-class": lambda: Phase,
    "ordered-dict": lambda: collections.OrderedDict(a=1),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "defaultdict-of-lambda-free": lambda: collections.defaultdict(functools.partial(float, 0)),
    "deque": lambda: collections.deque([1, 2], maxlen=5),
    "counter": lambda: collections.Counter("aab"),
    "chain-map": lambda: collections.ChainMap({"a": 1}),
    "namedtuple": lambda: Point(1, 2),
    "partial": lambda: functools.partial(harmless, scale=2.0),
    "partial-of-class": lambda: functools.partial(fractions.Fraction, 1),
    "function": lambda: harmless,
    "bound-method": lambda: Scheduler().rate,
    "types": lambda: [int, float, str, bool, dict, list, type(None), object],
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({1}),
    "bytearray": lambda: bytearray(b"abc"),
    "slice": lambda: slice(1, 2, 3),
    "complex": lambda: 1j,
    "decimal": lambda: decimal.Decimal("0.1"),
    "fraction": lambda: fractions.Fraction(1, 3),
    "uuid": lambda: uuid.UUID(int=5),
    "pattern": lambda: re.compile("a+"),
    "random-state": lambda: random.Random(0).getstate(),
    "random-object": lambda: random.Random(0),
    "logger": lambda: logging.getLogger("x"),
    "error": lambda: ValueError("x"),
    "os-error": lambda: FileNotFoundError(2, "no such file"),
    "itemgetter": lambda: operator.itemgetter(1),
    "ellipsis": lambda: [...],
    "not-implemented": lambda: [NotImplemented],
    "generic-alias": lambda: list[int],
    "any-type": lambda: typing.Any,
    "count": lambda: itertools.count(3) if hasattr(itertools.count, "__reduce__") else None,
}
# Each of these is refused although a plain training script can leave it in a checkpoint.
MISTAKEN: dict[str, Callable[[], Any]] = {
    "range": lambda: range(3),  # protocol 2 writes `__builtin__.xrange`
    "defaultdict-of-int": lambda: collections.defaultdict(int),  # `__builtin__.long`
    "defaultdict-of-str": lambda: collections.defaultdict(str),  # `__builtin__.unicode`
    "optional-type": lambda: typing.Optional[int],  # noqa: UP045  # typed configs keep these
    "union-type": lambda: typing.Union[int, str],  # noqa: UP007
    "callable-type": lambda: typing.Callable[..., int],
    "tuple-type": lambda: typing.Tuple[int, ...],  # noqa: UP006
    "numpy-random-state": lambda: np.random.RandomState(0),
    "numpy-generator": lambda: np.random.default_rng(0),
    "bytes-io": lambda: io.BytesIO(b"state"),  # Transformer Engine's _extra_state
    "zone-info": lambda: zoneinfo.ZoneInfo("UTC"),
    "partial-of-math": lambda: functools.partial(__import__("math").pow, 2.0),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BENIGN)
def test_benign(name: str) -> None:
    for protocol in range(2, 6):
        load(pickle.dumps({"extra": BENIGN[name]()}, protocol))


@pytest.mark.parametrize("name", MISTAKEN)
def test_mistaken_for_hostile(name: str) -> None:
    """A file with such a value is refused as hostile."""
    for protocol in range(2, 6):
        load(pickle.dumps({"extra": MISTAKEN[name]()}, protocol))


LIBRARIES = [
    "transformers.training_args.TrainingArguments",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.HubStrategy",
    "transformers.models.bert.modeling_bert.BertModel",
    "transformers.training_args.OptimizerNames",
    "accelerate.state.PartialState",
    "accelerate.utils.dataclasses.DistributedType",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "ultralytics.nn.tasks.DetectionModel",
    "ultralytics.nn.modules.conv.Conv",
    "models.yolo.Model",
    "timm.models.vision_transformer.VisionTransformer",
    "fairseq.tasks.translation.TranslationTask",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "megatron.enums.ModelType",
    "megatron.core.transformer.enums.AttnMaskType",
    "nemo.core.classes.common.Model",
    "speechbrain.dataio.dataset.DynamicItemDataset",
    "espnet2.torch_utils.model_summary.ModelSummary",
    "stable_baselines3.common.utils.ConstantSchedule",
    "gymnasium.spaces.box.Box",
    "monai.networks.nets.unet.UNet",
    "torchvision.models.resnet.ResNet",
    "torch.nn.modules.linear.Linear",
    "torch._C._nn.gelu",
    "torch.nn.functional.relu",
    "torch.optim.adamw.AdamW",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.utils.data.sampler.RandomSampler",
    "torch.ao.quantization.observer.HistogramObserver",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
    "numpy.dtype",
    "scipy.sparse._csr.csr_matrix",
    "pandas.core.frame.DataFrame",
    "pandas._libs.internals._unpickle_block",
    "sklearn.preprocessing._data.StandardScaler",
    "PIL.Image.Resampling",
    "tokenizers.Tokenizer",
    "wandb.sdk.wandb_config.Config",
    "hydra._internal.config_repository.ConfigRepository",
    "__main__.Config",
    "__main__.Trainer",
    "utils.AverageMeter",
    "config.Config",
    "models.resnet.ResNet",
    "dataset.build",
    "copyreg.__newobj__",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "_codecs.encode",
    "__builtin__.set",
    "builtins.frozenset",
    "__builtin__.object",
    "pathlib._local.PosixPath",
]


@pytest.mark.parametrize("full", LIBRARIES)
def test_library_names_are_data(full: str) -> None:
    module, _, name = full.rpartition(".")
    assert verdict(module, name, ()) is None
    if module not in ("copyreg", "copy_reg", "_codecs"):  # these need arguments
        load(pickled([call(full), newobj(full), named(full)]))


HOSTILE = [
    *("os:system", "posix:system", "nt:system", "os:popen", "os:remove", "os:execv", "os:environ"),
    *("subprocess:Popen", "subprocess:check_output", "subprocess:run", "pty:spawn"),
    *("builtins:eval", "builtins:exec", "builtins:compile", "builtins:open", "builtins:input"),
    *("builtins:__import__", "builtins:breakpoint", "builtins:globals", "builtins:setattr"),
    *("builtins:delattr", "builtins:vars", "builtins:help", "builtins:exit", "builtins:quit"),
    *("__builtin__:eval", "__builtin__:execfile", "__builtin__:apply", "__builtin__:file"),
    *("builtins:memoryview.__init__", "builtins:dict.__class__", "__builtin__:reload"),
    *("importlib:import_module", "imp:load_source", "runpy:run_path", "runpy:_run_code"),
    *("code:interact", "pdb:run", "bdb:Bdb.run", "profile:run", "cProfile:run", "timeit:timeit"),
    *("trace:Trace", "doctest:run_docstring_examples", "webbrowser:open", "platform:popen"),
    *("shutil:rmtree", "shutil:copy", "tempfile:mktemp", "pathlib:Path.unlink", "glob:glob"),
    *("pathlib:Path.write_text", "pathlib:os.system", "io:open", "_io:open", "io:FileIO"),
    *("_io:FileIO", "codecs:open", "fileinput:input", "linecache:getline", "zipfile:ZipFile"),
    *("socket:socket", "socket:create_connection", "urllib.request:urlopen", "http.client:HTTP"),
    *("ftplib:FTP", "smtplib:SMTP", "asyncio:run", "asyncio:create_subprocess_shell"),
    *("ssl:get_server_certificate", "xmlrpc.client:ServerProxy", "telnetlib:Telnet"),
    # not in every version's standard library
    *("_pyrepl.pager:pipe_pager", "_interpreters:run_string", "pipes:Template", "asyncore:loop"),
    *("annotationlib:call_annotate_function", "crypt:crypt", "lib2to3.main:main"),
    *("ctypes:CDLL", "ctypes:cdll.LoadLibrary", "mmap:mmap", "sys:modules", "sys:exit"),
    *("sys:settrace", "gc:get_objects", "inspect:getattr_static", "types:FunctionType"),
    *("types:CodeType", "marshal:loads", "pickle:loads", "pickle:load", "_pickle:loads"),
    *("shelve:open", "sqlite3:connect", "dbm:open", "multiprocessing:Process"),
    *("threading:Thread", "signal:signal", "atexit:register", "venv:create", "ensurepip:bootstrap"),
    *("operator:attrgetter", "operator:methodcaller", "_operator:attrgetter", "functools:reduce"),
    *("logging:FileHandler", "time:sleep", "logging:os.system", "collections.abc:sys.modules"),
    *("random:_os.system", "re:sys.modules", "torch:load", "torch.serialization:load"),
    *("torch.hub:load", "torch.jit:load", "torch:ops", "torch:os.system"),
    *("torch.utils.cpp_extension:load", "torch.utils.collect_env:run"),
    *("torch._inductor.codecache:compile_file", "torch.utils._import_utils:os.system"),
    *("numpy:load", "numpy:fromfile", "numpy.f2py:compile", "numpy.testing._private.utils:run"),
    *("pandas:read_pickle", "pandas:eval", "joblib:load", "dill:loads", "cloudpickle:loads"),
    *("yaml:unsafe_load", "pip:main", "pip._internal:main", "IPython:start_ipython"),
    *("requests:get", "paramiko:SSHClient", "distutils.spawn:spawn", "setuptools:setup"),
    *("transformers:os.system", "a.b:subprocess.run", "x:__globals__", "x:C.__bases__"),
]
# Parts of modules that are otherwise data; each runs code or opens files in a trusting reader.
IN_DATA_MODULES = [
    *("uuid:_get_command_stdout", "uuid:getnode", "dataclasses:_create_fn", "typing:_eval_type"),
    *("typing:get_type_hints", "logging.config:dictConfig", "logging.config:fileConfig"),
    *("logging.config:listen", "logging.handlers:RotatingFileHandler", "argparse:FileType"),
]
# A module may be named with a part of the path in the name: STACK_GLOBAL follows dots.
DOTTED = [
    *("torch:serialization.load", "torch:hub.load", "torch:jit.load", "numpy:f2py.compile"),
    *("torch:utils.cpp_extension.load", "torch:utils.collect_env.run", "pandas:io.pickle.loads"),
]
# Python 3 translates the module names of Python 2 in protocols 0 to 2, so they are alive.
OLD_NAMES = [
    *("cPickle:loads", "commands:getoutput", "httplib:HTTPConnection", "urllib2:urlopen"),
    *("SocketServer:TCPServer", "xmlrpclib:ServerProxy", "anydbm:open", "thread:start_new_thread"),
    *("BaseHTTPServer:HTTPServer", "__builtin__:raw_input", "__builtin__:reduce"),
]


def assert_refused(full: str) -> None:
    module, _, name = full.partition(":")
    with pytest.raises(HostileError, match=re.escape(f"{module}.{name}")):
        load(pickled([call(named(full), "x")]))


@pytest.mark.parametrize("full", HOSTILE)
def test_hostile(full: str) -> None:
    assert_refused(full)


@pytest.mark.parametrize("full", IN_DATA_MODULES)
def test_powers_of_data_modules(full: str) -> None:
    """A data module's private or reaching parts pass for data."""
    assert_refused(full)


@pytest.mark.parametrize("full", DOTTED)
def test_dotted_names(full: str) -> None:
    """The tables of loaders look at the module alone, not at `module.name`."""
    assert_refused(full)


@pytest.mark.parametrize("full", OLD_NAMES)
def test_names_of_python_2(full: str) -> None:
    """`_compat_pickle` maps these to what they are today."""
    assert_refused(full)


@pytest.mark.parametrize("attribute", ["__globals__", "__class__", "__subclasses__", "__import__"])
def test_reaching_through_getattr(attribute: str) -> None:
    with pytest.raises(HostileError, match=attribute):
        load(pickled([call("builtins.getattr", named("x.f"), attribute)]))


@pytest.mark.parametrize("function", ["builtins.eval", "os.system", "subprocess.check_output"])
@pytest.mark.parametrize(
    "carrier", ["builtins.map", "functools.partial", "builtins.filter", "x.Thing", "builtins.list"]
)
def test_function_handed_to_another(carrier: str, function: str) -> None:
    with pytest.raises(HostileError, match=re.escape(function)):
        load(pickled([call(carrier, named(function), ["1"])]))
    with pytest.raises(HostileError, match=re.escape(function)):
        load(pickled([call(carrier, [named(function)])]))


CHAINS: dict[str, Code] = {
    "module out of torch": call(
        call("builtins.getattr", named("torch.os"), "system"), "touch marker"
    ),
    "module out of logging": call(
        call("builtins.getattr", named("logging.os"), "system"), "touch marker"
    ),
    "module out of random": call(
        call("builtins.getattr", named("random._os"), "system"), "touch marker"
    ),
    "module out of numpy": call(
        call("builtins.getattr", named("numpy.os"), "popen"), "touch marker"
    ),
    "file through a path": call(call("builtins.getattr", call("pathlib.Path", "x"), "unlink")),
    "partial of getattr": call(
        call("functools.partial", named("builtins.getattr"), named("torch.os"), "system")
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_module_reached_through_an_attribute(name: str) -> None:
    """`getattr(torch.os, "system")("...")` passes for a bound method and is not refused."""
    with pytest.raises(HostileError, match=r"getattr|os"):
        load(pickled([CHAINS[name]]))


def test_a_name_alone_is_no_call() -> None:
    """Naming a function runs nothing; torch.save of a config may hold `print` or `open`."""
    load(pickled({"callback": named("builtins.print")}))
