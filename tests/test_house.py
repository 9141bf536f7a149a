"""The house: which room knows which, how long and wide the files are, and that importing them changes nothing."""
import ast, importlib.util, re, subprocess, sys
import pytest
from common import ROOT
import train

ROOMS = ("engine", "extras", "fast", "files", "tools")
LINES = {"ddpm": 220, "unet": 210, "data": 130, "train": 260, "sample": 220, "evaluate": 220, "figures": 150}
FILES = sorted(f.relative_to(ROOT) for where in (ROOT, *(ROOT/room for room in ROOMS)) for f in where.glob("*.py")
               if not f.name.startswith("test_"))
NAMES = [".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in FILES]
BELOW = {"ddpm", "unet", "data", "engine", "files"}
# what a room, or a module that is not as its room is, may know of the others
KNOWS = {"fast": set(), "ddpm": set(), "unet": {"fast"}, "files": set(), "files.checkpoint": {"unet", "ddpm"},
         "files.hub": {"unet", "ddpm"}, "engine": {"files", "fast"}, "data": {"files", "engine.streams"},
         "extras": BELOW, "sample": BELOW | {"extras"}, "evaluate": BELOW | {"extras", "sample"},
         "train": BELOW | {"extras", "sample"},
         "figures": BELOW | {"extras", "sample", "train", "evaluate"}, "tools": {*NAMES, *ROOMS}}

def room(name): return name.split(".")[0]

def imports(name, inside_functions):
  """The modules of the project that a module imports, with or without what its functions import."""
  def walk(node):
    for child in ast.iter_child_nodes(node):
      if inside_functions or not isinstance(child, ast.FunctionDef | ast.Lambda): yield from (child, *walk(child))
  found, path = set(), FILES[NAMES.index(name)]
  for node in walk(ast.parse((ROOT/path).read_text())):
    if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(NAMES)
      found |= inner or {node.module}
  return {n for n in found if n in NAMES}

@pytest.mark.parametrize("name", NAMES)
def test_arrows_run_down(name):
  known = KNOWS.get(name, KNOWS.get(room(name)))
  assert known is not None, f"{name} has no place in this house"
  for other in imports(name, True):
    assert room(other) == room(name) or {other, room(other)} & known, f"{name} -> {other}"

def test_no_circle():
  left = {name: imports(name, False) - {name} for name in NAMES}
  assert sum(map(len, left.values())) > 80
  while free := [name for name, needs in left.items() if not needs & left.keys()]:
    for name in free: del left[name]
  assert not left

@pytest.mark.parametrize("turn", (1, -1))
def test_importing_changes_nothing(tmp_path, turn):
  """In any order: neither the environment, nor tinygrad, nor Python's settings, nor a file; no device, no thread."""
  needed = {"tools.torch_peer": "torch"}
  names = [n for n in NAMES if importlib.util.find_spec(needed.get(n, "numpy"))][::turn]
  code = f"""
import importlib, os, signal, sys, threading, warnings
import numpy, PIL.Image, tinygrad
for name in {sorted(theirs())!r}: importlib.import_module(name)
def state():
  owners = [m for n, m in sorted(sys.modules.items()) if n.startswith("tinygrad")]
  classes = {{v for m in owners for v in vars(m).values() if isinstance(v, type)}}
  owners += [v for v in classes if v.__module__.startswith("tinygrad")]
  found = {{(str(o), k): v for o in owners for k, v in list(vars(o).items()) if not k.startswith("__")}}
  found |= {{("setting", k): v.value for k, v in tinygrad.helpers.ContextVar._cache.items()}}
  found |= {{("environment", k): v for k, v in os.environ.items()}}
  found |= {{("signal", s): signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}}
  found |= {{("filter", i): v for i, v in enumerate(warnings.filters)}}
  return found | {{("random", "numpy"): numpy.random.get_state()[1].tobytes(), ("hook", "sys"): sys.excepthook}}
before, variables = state(), len(os.environ)
for name in {names!r}: importlib.import_module(name)
after = state()
print([k for k, v in before.items() if k not in after or v is not after[k] and v != after[k]])
print(len(os.environ) - variables, sorted(tinygrad.Device._opened_devices), threading.active_count())
"""
  env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.stdout == "[]\n0 [] 1\n" and not done.stderr, done.stdout + done.stderr
  assert not [f for f in tmp_path.rglob("*") if f.is_file()]

def theirs():
  """The modules of tinygrad that the project imports."""
  text = "\n".join((ROOT/f).read_text() for f in FILES)
  found = set(re.findall(r"(?:from|import) (tinygrad\.[\w.]+)", text))
  return {n for n in found if n != "tinygrad.runtime.ops_cl" and importlib.util.find_spec(n)}

@pytest.mark.parametrize("name", LINES)
def test_the_papers_files_fit_beside_the_paper(name):
  lines = (ROOT/f"{name}.py").read_text().splitlines()
  assert len(lines) <= LINES[name]
  assert not [i for i, line in enumerate(lines, 1) if len(line) > 100]

def text_files():
  for top in sorted(ROOT.iterdir()):
    if top.name == "runs" or top.name.startswith(".") and top.name != ".ci": continue
    for path in (top, *top.rglob("*")):
      if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", "") and path.is_file(): yield path

def test_widths():
  assert len((ROOT/"test_ddpm.py").read_text().splitlines()) <= 850
  wide = [f"{f.relative_to(ROOT)}:{i}" for f in text_files() if f.suffix == ".py"
          for i, line in enumerate(f.read_text().splitlines(), 1) if len(line) > 120]
  assert not wide

def test_words_that_do_not_belong():
  """Folders of one machine, and what is known only to those who built the house."""
  words = re.compile(r"/wo[r]k/|/ho[m]e/\w|/ro[o]t/|/tm[p]/\w|\biss[u]e #?\d|\bREVI[E]W\b|\bDESI[G]N\b", re.I)
  found = [f"{f.relative_to(ROOT)}:{i}: {line}" for f in text_files()
           for i, line in enumerate(f.read_text(errors="replace").splitlines(), 1) if words.search(line)]
  assert not found

def test_no_more_than_42_flags(capsys):
  with pytest.raises(SystemExit): train.arguments(["--help"])
  assert 20 < len(re.findall(r"^  --", capsys.readouterr().out, re.M)) <= 42
