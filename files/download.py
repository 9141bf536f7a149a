"""Models from the hub, owner/name or owner/name@revision, as `files.hub` reads them: found here or fetched."""
import fcntl, http.client, os, re, shutil, sys, urllib.error, urllib.parse, urllib.request
from pathlib import Path
from typing import Any, BinaryIO
from tinygrad import helpers
from files.atomic import atomic
from files.bar import progress
from files.hub import NETWORKS, WEIGHTS, find_network, find_weights, read_json, shards
from files.weights import converting, open_tensors

YES = ("1", "true", "yes", "on")

def is_name(text:str) -> bool:
  """Whether it is owner/name or owner/name@revision."""
  return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text) is not None

def model(name:str, raw:bool=False) -> Path:
  """The folder of a model on the hub, owner/name or owner/name@revision: in tinygrad's cache, or where huggingface's
  own programs have it. What is missing is fetched into tinygrad's cache. raw: see `hub.load`.

  $HF_ENDPOINT, $HF_TOKEN, $HF_HUB_OFFLINE, $HF_HUB_CACHE and $HF_HOME mean what they mean there. OSError, in one
  sentence, when that fails."""
  repo, revision = (name.split("@") + ["main"])[:2]
  folder = Path(helpers.cache_dir)/"downloads"/f"{repo}@{revision.replace('/', '--')}"
  theirs, offline = in_their_cache(repo, revision), os.environ.get("HF_HUB_OFFLINE", "").lower()
  if complete(folder, raw): return folder
  there = complete(theirs, raw)
  # other programs may have fetched the network without its diffusion
  if there and (offline in YES or any(theirs.glob("**/scheduler_config.json"))): return theirs
  if offline in YES: raise OSError(f"{name!r} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub")
  url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
  url = f"{url}/{urllib.parse.quote(repo)}/resolve/{urllib.parse.quote(revision, safe='')}"
  try: return fetched(name, url, folder, theirs, raw)
  except OSError:
    if not there: raise
    return theirs

def fetched(name:str, url:str, folder:Path, theirs:Path, raw:bool) -> Path:
  """The folder, with all that the hub has of a model. What is in the folder `theirs` is copied from there."""
  def get(file:str) -> bool:
    """Whether the hub has it, and then we too."""
    if (theirs/file).is_file() and not (folder/file).exists():
      with open(theirs/file, "rb") as source, atomic(folder/file) as f: shutil.copyfileobj(source, f)
    try: fetch(f"{url}/{file}", folder/file, f"{name}/{file}")
    except (OSError, ValueError) as e:
      code, why = getattr(e, "code", None), " ".join(str(e).split())
      if code == 404: return False
      if code in (401, 403): why += ": if there is such a model, it is private or asks for consent: set HF_TOKEN"
      raise OSError(f"{name!r} is neither a file nor a folder here, and it could not be downloaded from {url}: "
                    f"{why}") from e
    return True
  get("model_index.json")
  place = next((p for p in NETWORKS if get(p+"config.json") and p not in NETWORKS[:raw]), None)
  if place is None:
    raise OSError(f"{name!r} is neither a file nor a folder here, and the hub has no config.json of that name (404)")
  any(map(get, ("scheduler/scheduler_config.json", "scheduler_config.json")))
  for file in WEIGHTS:  # last, so that where they are all is
    if not get(place+file): continue
    for part in shards(folder/place/file) if file.endswith(".json") else ():
      if not get(place+part.name): raise OSError(f"the hub lacks {part.name} of {name!r}")
    return folder
  raise OSError(f"the hub has no {WEIGHTS[0]} of {name!r}, and a pickle is not loaded: if it has a .bin, where PyTorch "
                f"is at hand, {converting('diffusion_pytorch_model.bin')} makes such a file of it")

def in_their_cache(repo:str, revision:str) -> Path:
  """Where huggingface's own programs keep that revision."""
  env = os.environ.get
  home = Path(env("HF_HOME") or Path(env("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
  cache = Path(env("HF_HUB_CACHE") or home/"hub").expanduser()/f"models--{repo.replace('/', '--')}"
  try: commit = (cache/"refs"/revision).read_text().strip()
  except (OSError, ValueError): commit = revision
  return cache/"snapshots"/commit

def complete(folder:Path, raw:bool) -> bool:
  """Whether all of a model is in the folder."""
  try: return all(f.is_file() for f in find_weights(find_network(folder, raw)))
  except (OSError, ValueError): return False

def fetch(url:str, path:Path, desc:str):
  """Downloads a file, which gets its name when it is whole and what the name says. What broke off is kept and gone on
  with: at once if some of it came, else the next time. OSError if it fails."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part, tag = path.with_name(path.name+".part"), path.with_name(path.name+".etag")
  with locked(part, desc) as f:
    try:
      while not path.is_file():
        begun = f.tell()
        try: receive(url, f, tag, desc)
        except urllib.error.HTTPError as e:
          if not begun or e.code != 416: raise
          try: finish(f, path)  # is all of it here already?
          except OSError: f.truncate(f.seek(0))  # no, what is here is no part of what is there
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
          if f.tell() <= begun: raise OSError(getattr(e, "reason", e)) from e
        else: finish(f, path)
    finally:
      if not f.tell(): part.unlink(missing_ok=True)
      if not f.tell() or path.is_file(): tag.unlink(missing_ok=True)

def locked(part:Path, desc:str) -> BinaryIO:
  """A file to append to, which no other program has meanwhile: one that has is waited for."""
  while True:
    f = open(part, "ab")  # noqa: SIM115
    try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"waiting for another program, which downloads {desc}", file=sys.stderr)
      fcntl.flock(f, fcntl.LOCK_EX)
    except OSError: pass  # a file system without locks
    f.seek(0, os.SEEK_END)
    if os.fstat(f.fileno()).st_nlink: return f
    f.close()  # the other one has finished or removed it

def finish(f:BinaryIO, path:Path):
  """Gives a file that was received its name, or empties it: OSError for what is not JSON or not safetensors."""
  f.flush()
  try: (read_json if path.suffix == ".json" else open_tensors)(Path(f.name))
  except ValueError as e:
    f.truncate(f.seek(0))
    raise OSError(str(e).replace(f.name, f"its answer for {path.name}")) from None
  os.fsync(f.fileno())
  os.replace(f.name, path)

def receive(url:str, f:BinaryIO, tag:Path, desc:str):
  """Appends to f what is missing of it, or all of it anew if it has changed since; `tag` has its version.

  ConnectionError if it breaks off."""
  begun, request = f.tell(), urllib.request.Request(url, headers={"User-Agent": "ddpm"})
  if token := os.environ.get("HF_TOKEN", "").strip():
    if not (token.isascii() and token.isprintable()): raise ValueError("HF_TOKEN is no token")
    request.add_unredirected_header("Authorization", f"Bearer {token}")
  if begun and tag.is_file() and (version := tag.read_text()):
    for key, value in (("Range", f"bytes={begun}-"), ("If-Range", version)): request.add_header(key, value)
  with urllib.request.build_opener(Redirects).open(request, timeout=60) as answer:
    if answer.status != 206: begun = f.truncate(f.seek(0))
    tag.write_text(answer.headers.get("ETag") or "")
    rest = int(answer.headers.get("Content-Length") or 0)
    for block in progress(iter(lambda: answer.read1(2**20), b""), desc, rest, len): f.write(block)
  if rest and f.tell() != begun+rest: raise ConnectionError("the connection broke off")

class Redirects(urllib.request.HTTPRedirectHandler):
  """The token goes along within the hub, as a renamed model needs it, and to no other host."""
  def redirect_request(self, req:urllib.request.Request, fp:Any, code:int, msg:str, headers:Any, newurl:str):
    new = super().redirect_request(req, fp, code, msg, headers, newurl)
    origins = [urllib.parse.urlsplit(url)[:2] for url in (req.full_url, newurl)]
    if new and origins[0] == origins[1]: new.unredirected_hdrs = req.unredirected_hdrs
    return new
