"""Runs the Autobahn test suite's own fuzzing client under Python 3.

The suite (PyPI `autobahntestsuite`) is written for Python 2. Nothing of it is kept here: its modules are translated as
they are imported, by three rules.

1. Syntax and names: by `fissix` (lib2to3), and `/` of two integers is an integer.
2. Bytes: Python 2's strings are bytes. Here they stay strings, of the characters 0 to 255, and `Edge` turns them into
   bytes and back where the suite meets the library `autobahn`, which knows both.
3. Two values are compared by `==`; the suite pickles both, which is not the same for equal strings in Python 3.

What a case sends, what it expects and how it judges is the suite's.

    fuzzingclient.py SPEC.json      as `wstest -m fuzzingclient -s SPEC.json`
    fuzzingclient.py --list         all cases, a line each
"""

import ast
import binascii
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import types
import warnings
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

warnings.simplefilter("ignore")  # of the suite's age
logging.getLogger("fissix").setLevel(logging.WARNING)

SUITE = "autobahntestsuite"


def as_bytes(value):
    """A string of the suite as the bytes it stands for."""
    return value.encode("latin-1") if isinstance(value, str) else value


def as_string(value):
    """Bytes as the suite's string of them; a list of them joined."""
    if isinstance(value, (list, tuple)):
        value = b"".join(value)
    return bytes(value).decode("latin-1") if isinstance(value, (bytes, bytearray)) else value


# What the translated modules find in the place of what they import or call.

def divide(left, right):
    return left // right if isinstance(left, int) and isinstance(right, int) else left / right


def decode(value, *arguments, **options):
    return as_bytes(value).decode(*arguments, **options)


def hexlify(data):
    return binascii.hexlify(as_bytes(data)).decode()


class Python2(ast.NodeTransformer):
    """What fissix leaves."""

    def __init__(self, path):
        self.folder = os.path.dirname(path)

    def visit_Import(self, node):
        for name in node.names:
            if name.name == "binascii":
                name.name, name.asname = "suite_binascii", "binascii"
        return node

    def visit_ImportFrom(self, node):
        # Python 2 looks beside the module first.
        if any(os.path.exists(os.path.join(self.folder, node.module + end)) for end in (".py", "/__init__.py")):
            node.level = 1
        return node

    def visit_Tuple(self, node):
        self.generic_visit(node)
        # Bases of a class: every class derives from `object`, which stands last.
        if len(node.elts) > 1 and isinstance(node.elts[0], ast.Name) and node.elts[0].id == "object":
            del node.elts[0]
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        return call("suite_divide", node, node.left, node.right) if isinstance(node.op, ast.Div) else node

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "decode":
            node.args.insert(0, node.func.value)
            node.func = ast.copy_location(ast.Name("suite_decode", ast.Load()), node)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "validate":  # the library's, of UTF-8
            node.args = [call("suite_bytes", node, argument) for argument in node.args]
        return node


def call(name, at, *arguments):
    function = ast.Name(name, ast.Load())
    return ast.fix_missing_locations(ast.copy_location(ast.Call(function, list(arguments), []), at))


class Translator(SourceFileLoader):
    """Loads a module of the suite as Python 3. What it makes is cached as bytecode is."""

    fixers = None

    def source_to_code(self, data, path, **_):
        from fissix.refactor import RefactoringTool, get_fixers_from_package

        if Translator.fixers is None:
            Translator.fixers = RefactoringTool(get_fixers_from_package("fissix.fixes"))
        # Latin-1, so that a character beyond ASCII in a literal is the bytes that it is in the file.
        source = str(Translator.fixers.refactor_string(data.decode("latin-1") + "\n", os.fspath(path)))
        return compile(Python2(path).visit(ast.parse(source, path)), path, "exec")

    def exec_module(self, module):
        module.suite_divide, module.suite_decode, module.suite_bytes = divide, decode, as_bytes
        super().exec_module(module)


class Finder:
    """Finds the suite's modules for `Translator`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if not name.startswith(SUITE + "."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            spec.loader = Translator(name, spec.origin)
        return spec


def import_suite():
    """The suite's `fuzzing` and `case`. Its package imports all of its modes, so another stands in its place."""
    origin = importlib.util.find_spec(SUITE).origin
    # Bytecode is kept for this version of the translation.
    with open(__file__, "rb") as file:
        sys.pycache_prefix = os.path.join(sys.prefix, "translated", hashlib.sha256(file.read()).hexdigest()[:16])
    package = types.ModuleType(SUITE)
    package.__path__ = [os.path.dirname(origin)]
    package.__spec__ = ModuleSpec(SUITE, None, origin=origin, is_package=True)
    package.__file__ = origin
    package.version = importlib.metadata.version(SUITE)
    sys.modules[SUITE] = package
    shim = types.ModuleType("suite_binascii")
    shim.b2a_hex = shim.hexlify = hexlify
    sys.modules["suite_binascii"] = shim
    import txaio
    import zope.interface

    txaio.use_twisted()
    zope.interface.implements = lambda *_: None  # of case 9.9.1, which the suite imports and does not run
    sys.meta_path.insert(0, Finder)
    return importlib.import_module(SUITE + ".fuzzing"), importlib.import_module(SUITE + ".case")


def edge(fuzzing, case):
    """The suite's client with bytes towards the library and strings towards the cases."""
    ours = fuzzing.FuzzingClientProtocol

    class Edge(ours):
        # The suite to the library. The library calls some of these itself, with bytes.

        def sendFrame(self, opcode, payload=b"", fin=True, rsv=0, mask=None, payload_len=None, chopsize=None, sync=False):
            payload = as_bytes(payload)
            if payload_len is not None:
                # The library repeats it as many times as a division of Python 2 says.
                payload = (payload * (payload_len // len(payload) + 1))[:payload_len]
            return super().sendFrame(opcode, payload, fin, rsv, mask, None, chopsize, sync)

        def sendMessage(self, payload, *arguments, **options):
            return super().sendMessage(as_bytes(payload), *arguments, **options)

        def sendMessageFrameData(self, payload, *arguments, **options):
            return super().sendMessageFrameData(as_bytes(payload), *arguments, **options)

        def sendCloseFrame(self, code=None, reasonUtf8=None, isReply=False):
            return super().sendCloseFrame(code, as_bytes(reasonUtf8), isReply)

        # The library to the suite.

        def onMessage(self, payload, binary):
            # The compression cases are written for bytes.
            bytes_wanted = type(self.runCase).__name__.startswith(("Case12_", "Case13_"))
            return super().onMessage(payload if bytes_wanted else as_string(payload), binary)

        def onPong(self, payload):
            return super().onPong(as_string(payload))

        def logRxFrame(self, header, payload):
            return super().logRxFrame(header, [as_string(payload)])

        def logTxFrame(self, header, payload, *arguments):
            return super().logTxFrame(header, as_string(payload), *arguments)

        def logRxOctets(self, data):
            return super().logRxOctets(as_string(data))

        def logTxOctets(self, data, sync):
            return super().logTxOctets(as_string(data), sync)

        def connectionLost(self, reason):
            for name in ("http_request_data", "http_response_data", "localCloseReason", "remoteCloseReason"):
                if isinstance(getattr(self, name, None), bytes):
                    setattr(self, name, as_string(getattr(self, name)))
            return super().connectionLost(reason)

    class Factory(fuzzing.FuzzingClientFactory):
        def buildProtocol(self, address):
            # Its own builds its own protocol by name.
            fuzzing.FuzzingClientProtocol = Edge
            return super().buildProtocol(address)

        def createReports(self):
            # The pages for people are of no use to a runner, and the slower half.
            return super().createReports(produceHtml=False)

    case.Case.compare = lambda self, left, right: left == right
    return Factory


def main():
    fuzzing, case = import_suite()
    if sys.argv[1] == "--list":
        named = fuzzing.CaseSet(case.CaseSetname, case.CaseBasename, case.Cases, [], [])
        print(*named.parseSpecCases({"cases": ["*"]}), sep="\n")
        return 0
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    from twisted.internet import reactor
    from twisted.python import log

    # What a case raises would be a log entry and a run that never ends.
    failures = []

    def observe(event):
        if event.get("isError"):
            failures.append(log.textFromEventDict(event))
            if reactor.running:
                reactor.callLater(0, lambda: reactor.running and reactor.stop())

    log.addObserver(observe)
    edge(fuzzing, case)(spec)
    reactor.run()
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
