"""Section 4's set-up: datasets, downloads, folders, archives and arrays of images, batches."""
import contextlib, gzip, hashlib, http.server, io, json, os, re, resource, struct, subprocess, sys, tarfile
import threading, tracemalloc, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
import data
import numpy as np
import pytest
from common import DATA, ROOT, refused
from files import dataset, images as image_files, mirrors as sites
from PIL import Image, PngImagePlugin
from tinygrad import Tensor

@pytest.fixture
def offline(monkeypatch, tmp_path):
  """An empty cache, no $DATA_DIR and no network; gives a folder to work in."""
  def unreachable(*args, **kwargs): raise OSError("no network in tests")
  monkeypatch.setattr("urllib.request.urlopen", unreachable)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("DATA_DIR", raising=False)
  work = tmp_path / "work"
  work.mkdir()
  return work

def idx(array):
  return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()

def write_idx(folder, part="train", n=6, seed=0, pack=gzip.compress, end=".gz"):
  rng = np.random.default_rng(seed)
  images, labels = rng.integers(0, 256, (n, 5, 7), np.uint8), rng.integers(0, 10, n, np.uint8)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
  (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
  return images, labels

# *** datasets ***

@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="no MNIST here")
def test_mnist_is_mnist():
  x, y = data.load("mnist", data_dir=DATA)
  assert x.shape == (60000, 1, 28, 28) and x.dtype == np.uint8 and y.dtype == np.int32 and y[0] == 5
  assert np.bincount(y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
  assert abs(x.mean() / 255 - 0.1307) < 1e-4 and abs(x.std() / 255 - 0.3081) < 1e-4  # the constants everybody uses
  x, y = data.load("mnist", "test", DATA)
  assert x.shape == (10000, 1, 28, 28) and y[:5].tolist() == [7, 2, 1, 0, 4]
  for file, sha in sites.SHA256["mnist"].items():
    if (path := DATA / "mnist" / file).exists():
      assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == sha

@pytest.mark.skipif(not (DATA / "cifar10-jpg-test.zip").is_file(), reason="no JPEG copies of CIFAR-10 here")
def test_cifar10_from_jpegs():
  x, y = data.load("cifar10", "test", DATA)
  assert x.shape == (10000, 3, 32, 32) and np.bincount(y).tolist() == [1000] * 10
  with zipfile.ZipFile(DATA / "cifar10-jpg-test.zip") as z:
    names = sorted(n for n in z.namelist() if n.endswith(".jpg"))
    for i in (0, 4321, 9999):
      assert (x[i] == np.asarray(Image.open(io.BytesIO(z.read(names[i]))).convert("RGB")).transpose(2, 0, 1)).all()
      assert sites.CLASSES["cifar10"][y[i]] == names[i].split("/")[1]

def test_glyphs_are_digits_and_always_the_same():
  (x, y), (u, v) = data.load("glyphs"), data.load("glyphs", "test")
  assert x.shape == (10000, 1, 16, 16) and u.shape == (2000, 1, 16, 16) and x.dtype == np.uint8 and y.dtype == np.int32
  assert np.bincount(y).tolist() == [1000] * 10 and np.bincount(v).tolist() == [200] * 10
  assert np.array_equal(x, data.load("glyphs")[0]) and np.array_equal(u, data.load("glyphs", "test")[0])
  assert len(np.unique(x, axis=0)) == 10000
  assert not set(map(bytes, u)) & set(map(bytes, x))
  assert np.median(x) < 8 and x.max() == 255  # white on black
  assert max(x[:, 0, i].mean() for i in (0, -1)) < 25 and max(x[:, 0, :, i].mean() for i in (0, -1)) < 25  # nothing cut
  a, b = u.reshape(2000, -1).astype(np.float32), x.reshape(10000, -1).astype(np.float32)
  nearest = (a @ b.T - (b * b).sum(1) / 2).argmax(1)  # the nearest training image has the same digit: they can be read
  assert (y[nearest] == v).mean() > 0.97

def test_names_and_splits(offline):
  refused(lambda: data.load("minst"), "minst", *data.DATASETS, "or a folder of images", ".zip", ".npy", ".npz")
  for name in ("", "\0", "x" * 5000): refused(lambda: data.load(name))
  refused(lambda: data.load("glyphs", "validation"), "validation", "train", "test")
  refused(lambda: data.load("mnist", data_dir=offline / "gone"), offline / "gone")
  refused(lambda: data.load("mnist", size=16), "mnist", "size")
  refused(lambda: data.load("mnist", mode="rgb"), "mnist", "mode")
  refused(lambda: data.load("glyphs", fit="squeeze"), "squeeze", "crop", "pad", "stretch")
  refused(lambda: data.load("glyphs", mode="colour"), "colour", "gray", "rgb")
  refused(lambda: data.load("mnist"), "train-images-idx3-ubyte.gz", "no network in tests", "DATA_DIR")
  refused(lambda: data.load("cifar10"), "cifar-10-binary.tar.gz", "no network in tests")

@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("end, pack", [("", bytes), (".gz", gzip.compress)])
def test_idx_layouts(offline, monkeypatch, place, end, pack):
  images, labels = write_idx(offline / place, pack=pack, end=end)
  x, y = data.load("mnist", data_dir=offline)
  assert np.array_equal(x[:, 0], images) and np.array_equal(y, labels) and y.dtype == np.int32
  x[:] = 0  # the caller's own to write to
  monkeypatch.setenv("DATA_DIR", str(offline))
  assert np.array_equal(data.load("mnist")[0][:, 0], images)

def test_where_files_are_looked_for(offline, monkeypatch):
  cache = Path(os.environ["XDG_CACHE_HOME"], "ddpm")
  for place, n in ((offline / "a", 3), (offline / "b", 4), (cache, 5)): write_idx(place / "mnist", n=n)
  assert len(data.load("mnist")[0]) == 5
  monkeypatch.setenv("DATA_DIR", str(offline / "b"))
  assert len(data.load("mnist")[0]) == 4 and len(data.load("mnist", data_dir=offline / "a")[0]) == 3
  (offline / "a" / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
  assert len(data.load("mnist", data_dir=offline / "a")[0]) == 4  # half a dataset is none
  write_idx(offline / "c")  # bare MNIST files are not taken for Fashion-MNIST, which has the same file names
  refused(lambda: data.load("fashion_mnist", data_dir=offline / "c"), "fashion_mnist")
  write_idx(offline / "fashion", n=7)
  assert len(data.load("fashion_mnist", data_dir=offline / "fashion")[0]) == 7

def test_damaged_idx_is_refused(offline):
  images, labels = write_idx(offline, pack=bytes, end="")
  file, good = offline / "train-images-idx3-ubyte", idx(images)
  def now(blob, *words):
    file.write_bytes(blob)
    refused(lambda: data.load("mnist", data_dir=offline), *words)
  now(good[:-1], file, "less")
  now(good + b"\0", file, "more")
  now(b"", file)
  now(good[:9], file)
  now(b"\0\0\x09\3" + good[4:], file, "IDX")  # signed bytes
  now(b"\0\0\x08\1" + good[4:], file, "IDX")  # one dimension
  now(idx(images[:0]), file, "impossible")
  now(b"\0\0\x08\3" + b"\xff" * 12, file, "impossible")
  now(idx(np.zeros((1, 1024, 1024), np.uint8)) + b"\0", file, "more")
  now(idx(images[:5]), file, "5 images", "6 labels")
  packed = gzip.compress(good)
  now(packed[:-9], file)
  now(packed[:-6] + bytes(6), file)  # wrong checksum
  now(packed + b"junk", file)
  file.write_bytes(good)
  (offline / "train-labels-idx1-ubyte").write_bytes(idx(np.full(6, 10, np.uint8)))
  refused(lambda: data.load("mnist", data_dir=offline), "label 10")

def test_a_false_claim_of_size_allocates_nothing(offline):
  write_idx(offline, pack=bytes, end="")
  file = offline / "train-images-idx3-ubyte"
  claim = lambda *shape: b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in shape)
  for blob in (claim(2**32 - 1, 2**32 - 1, 2**32 - 1), claim(250, 1000, 1000) + bytes(9),
               gzip.compress(claim(1, 2, 3) + bytes(10**8), 1)):
    file.write_bytes(blob)
    tracemalloc.start()
    refused(lambda: data.load("mnist", data_dir=offline), file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e7

def write_cifar(folder, n=3):
  """A small CIFAR-10 in the binary version, packed; gives the images and labels of the training part."""
  rng = np.random.default_rng(1)
  files, images, labels = {}, [], []
  for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
    pixels, label = rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, 10, n, np.uint8)
    files[name] = b"".join(bytes([l]) + p[0].tobytes() + p[1].tobytes() + p[2].tobytes() for p, l in zip(pixels, label))
    if "data" in name: images.append(pixels), labels.append(label)
  with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
    for name, blob in files.items():
      info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      info.size = len(blob)
      tar.addfile(info, io.BytesIO(blob))
  return np.concatenate(images), np.concatenate(labels), files

def test_cifar10_binary(offline):
  images, labels, files = write_cifar(offline)
  for _ in range(2):
    x, y = data.load("cifar10", data_dir=offline)
    assert np.array_equal(x, images) and np.array_equal(y, labels) and y.dtype == np.int32
    assert len(data.load("cifar10", "test", offline)[0]) == 3
    (offline / "cifar-10-batches-bin").mkdir(exist_ok=True)  # and once more, unpacked
    for name, blob in files.items(): (offline / "cifar-10-batches-bin" / name).write_bytes(blob)
    with contextlib.suppress(FileNotFoundError): (offline / "cifar-10-binary.tar.gz").unlink()
  for bad in (b"", bytes(3072), bytes(3074), b"\x0a" + bytes(3072), bytes(30_733_073)):
    (offline / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(bad)
    refused(lambda: data.load("cifar10", data_dir=offline), offline)
  with tarfile.open(offline / "cifar-10-binary.tar.gz", "w:gz") as tar:  # a folder where a file should be
    info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    info.type = tarfile.DIRTYPE
    tar.addfile(info)
  (offline / "cifar-10-batches-bin" / "test_batch.bin").unlink()
  refused(lambda: data.load("cifar10", "test", offline), "cifar-10-binary.tar.gz")

def write_jpegs(file, skip=""):
  with zipfile.ZipFile(file, "w") as z:
    for i, name in enumerate(sites.CLASSES["cifar10"]):
      blob = io.BytesIO()
      Image.new("L", (32, 32), i * 20).save(blob, "JPEG", quality=95)
      if name != skip: z.writestr(f"test/{name}/0001.jpg", blob.getvalue())

def test_cifar10_as_jpegs(offline, capsys, monkeypatch):
  file = offline / "cifar10-jpg-test.zip"
  write_jpegs(file)
  x, y = data.load("cifar10", "test", offline)
  assert x.shape == (10, 3, 32, 32) and y.tolist() == list(range(10))  # three channels, even if all are gray
  assert np.abs(x.mean((1, 2, 3)) - np.arange(10) * 20).max() < 1 and "lossy" in capsys.readouterr().err
  write_jpegs(file, skip="deer")
  refused(lambda: data.load("cifar10", "test", offline), file.name, "deer")
  write_jpegs(file)
  with monkeypatch.context() as m:
    m.setattr(image_files, "LIMIT", 100)  # larger files in the archive are not unpacked
    file.touch()
    refused(lambda: data.load("cifar10", "test", offline), "all 10", "too large")
  file.write_bytes(b"PK not a zip")
  refused(lambda: data.load("cifar10", "test", offline), file.name)

def test_names_of_classes_and_held_out_halves(offline):
  found = data.read("glyphs", "test")
  assert found.heldout and found.classes == list("0123456789") and found.limits is None
  assert found.about == "2000 images of 1 x 16 x 16 in 10 classes"
  images, _ = write_idx(offline / "fashion_mnist")
  found = data.read("fashion_mnist", data_dir=offline)
  assert found.heldout and found.classes[0] == "t-shirt" and found.classes[9] == "boot" and len(found.classes) == 10
  assert int(found.digest[:8], 16) == zlib.crc32(images.tobytes())
  cut = data.read("fashion_mnist", data_dir=offline, multiple=4)  # 5x7 is no multiple of 4
  assert np.array_equal(cut.images[:, 0], images[:, :4, 1:5]) and "cut from 5x7 to 4x4" in cut.about
  assert cut.digest != found.digest
  refused(lambda: data.read("fashion_mnist", data_dir=offline, multiple=8), "5x7", "8x8", "size")

# *** downloads ***

@pytest.fixture
def mirrors(tmp_path, monkeypatch):
  """A server on this machine whose first three mirrors fail in different ways: gives {path asked: times}."""
  images, labels = write_idx(tmp_path / "served")
  asked = []
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      how, name = self.path.strip("/").split("/")
      blob = (tmp_path / "served" / name).read_bytes()
      sent = {"cut": blob[:-20], "altered": gzip.compress(gzip.decompress(blob)[:-1] + b"\0")}.get(how, blob)
      self.send_response(404 if how == "dead" else 200)
      self.send_header("Content-Length", str(len(blob) if how == "cut" else len(sent)))
      self.end_headers()
      if how != "dead": self.wfile.write(sent)
    def log_message(self, *args): pass
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
  base = f"http://127.0.0.1:{server.server_port}/"
  monkeypatch.setitem(sites.MIRRORS, "mnist", [f"{base}{how}/" for how in ("dead", "cut", "altered", "good")])
  monkeypatch.setitem(sites.SHA256, "mnist", {"train-images-idx3-ubyte.gz": hashlib.sha256(idx(images)).hexdigest(),
                                             "train-labels-idx1-ubyte.gz": hashlib.sha256(idx(labels)).hexdigest()})
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("DATA_DIR", raising=False)
  monkeypatch.setenv("no_proxy", "*")
  yield images, asked, tmp_path
  server.shutdown()
  server.server_close()

def test_download_goes_on_to_the_next_mirror(mirrors):
  images, asked, tmp_path = mirrors
  assert np.array_equal(data.load("mnist")[0][:, 0], images)
  assert [p.split("/")[1] for p in asked] == ["dead", "cut", "altered", "good"] * 2
  assert np.array_equal(data.load("mnist")[0][:, 0], images) and len(asked) == 8  # the second time from the cache
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(sites.SHA256["mnist"])
  (tmp_path / "xdg/ddpm/mnist/train-labels-idx1-ubyte.gz").unlink()
  assert np.array_equal(data.load("mnist")[0][:, 0], images) and len(asked) == 12  # only what is missing

def test_a_wrong_download_never_enters_the_cache(mirrors, monkeypatch):
  _, asked, tmp_path = mirrors
  monkeypatch.setitem(sites.MIRRORS, "mnist", sites.MIRRORS["mnist"][:3])
  refused(lambda: data.load("mnist"), "train-images-idx3-ubyte.gz", "404", "broke off", "SHA-256")
  assert len(asked) == 3 and not list((tmp_path / "xdg/ddpm/mnist").iterdir())
  monkeypatch.setattr(sites, "LIMIT", 100)
  refused(lambda: data.load("mnist"), "too long")

def test_two_downloads_at_once(mirrors):
  images, _, tmp_path = mirrors
  program = f"""if True:
    import data
    from files import mirrors as sites
    sites.MIRRORS["mnist"], sites.SHA256["mnist"] = {sites.MIRRORS["mnist"]}, {sites.SHA256["mnist"]}
    print(data.load("mnist")[0].sum(dtype=int))"""
  programs = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
  assert [int(p.communicate()[0]) for p in programs] == [images.sum(dtype=int)] * 2
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(sites.SHA256["mnist"])
  for file in sites.SHA256["mnist"]: (tmp_path / "xdg/ddpm/mnist" / file).unlink()
  with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: data.load("mnist")[0], range(4)))
  assert all(np.array_equal(x[:, 0], images) for x in found)
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(sites.SHA256["mnist"])

def test_digest_of_the_file_itself_and_the_published_names(mirrors, monkeypatch):
  images, _, tmp_path = mirrors
  blobs = {name: (tmp_path / "served" / name).read_bytes() for name in sites.SHA256["mnist"]}
  monkeypatch.setitem(sites.SHA256, "mnist", {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()})
  assert np.array_equal(data.load("mnist")[0][:, 0], images)
  for name in ("mnist", "fashion_mnist", "cifar10"):
    assert len(sites.MIRRORS[name]) >= 2
    assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in sites.SHA256[name].values())

# *** folders ***

def png(width, height, bits=1, rows=b""):
  """A PNG of one gray channel, made by hand."""
  chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
  head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((bits, 0, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")

def one(folder, img, name="a.png", **how):
  """What `load` makes of a folder with this one image."""
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.iterdir(): old.unlink()
  if isinstance(img, bytes): (folder / name).write_bytes(img)
  else: img.save(folder / name, **how)
  return data.load(str(folder))[0][0]

def test_every_kind_of_image_looks_as_people_see_it(offline):
  f, red = offline / "f", (255, 0, 0)
  flat = lambda x: [np.unique(c).tolist() for c in x]
  palette = Image.new("P", (8, 8), 1)
  palette.putpalette([0, 0, 0, 255, 0, 0])
  assert flat(one(f, palette)) == [[255], [0], [0]]
  assert flat(one(f, palette, transparency=1)) == [[255]]  # transparent: white, which is gray
  assert flat(one(f, Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == [[255]]
  assert flat(one(f, Image.new("RGBA", (8, 8), (0, 0, 255, 51)))) == [[204], [204], [255]]  # 1/5 blue on white
  assert flat(one(f, Image.new("LA", (8, 8), (0, 255)))) == [[0]]
  assert flat(one(f, Image.new("1", (8, 8), 1))) == [[255]]
  assert flat(one(f, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.tif")) == [[255], [0], [0]]
  x = one(f, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.JPG", format="JPEG", quality=95)
  assert x[0].min() > 240 and x[1:].max() < 15
  ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)  # 16 bits: scaled, not clipped
  assert np.abs(one(f, Image.fromarray(ramp))[0] - ramp / 257).max() <= 0.5
  assert np.abs(one(f, Image.fromarray(ramp), "a.tiff")[0] - ramp / 257).max() <= 0.5
  assert np.abs(one(f, Image.fromarray(ramp.astype(np.int32)), "a.tiff")[0] - ramp / 257).max() <= 0.5
  assert np.abs(one(f, Image.fromarray((ramp / 65535).astype(np.float32)), "a.tiff")[0] - ramp / 257).max() <= 0.5
  assert one(f, png(8, 8, 16, bytes(17 * 8)))[0].max() == 0
  frames = [Image.new("RGB", (8, 8), c) for c in (red, (0, 255, 0))]
  assert flat(one(f, frames[0], "a.gif", save_all=True, append_images=frames[1:])) == [[255], [0], [0]]
  turned = Image.fromarray(np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[:, None], 8, 1))  # dark at the top
  exif = Image.Exif()
  exif[0x0112] = 6  # "turn it right by a quarter": dark at the right
  x = one(f, turned, exif=exif)[0]
  assert x[0].tolist() == list(range(224, -1, -32)) and (x == x[0]).all()
  wide = turned.resize((12, 8))  # with the exif it is 8 wide and 12 high; nothing is cropped, and nothing is black
  for name, more in (("a.png", {}), ("a.jpg", {"quality": 95}), ("a.tif", {}), ("a.webp", {"lossless": True})):
    x = one(f, wide, name, exif=exif, **more)[0]
    assert x.shape == (12, 8) and np.abs(x - np.arange(224., -1, -32)).max() < 6, name
  raw, profile, xmp = exif.tobytes(), PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()  # ImageMagick's and Adobe's
  profile.add_text("Raw profile type exif", f"\nexif\n{len(raw):8d}\n{raw.hex()}\n", zip=True)
  xmp.add_itxt("XML:com.adobe.xmp", '<r xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"></r>')
  for late in ({"pnginfo": profile}, {"pnginfo": xmp}, b"eXIf" + raw.removeprefix(b"Exif\0\0")):  # or behind the pixels
    wide.save(file := io.BytesIO(), "PNG", **late if isinstance(late, dict) else {})
    chunks = file.getvalue()
    if isinstance(late, bytes):
      size, crc = (struct.pack(">I", n) for n in (len(late) - 4, zlib.crc32(late)))
      chunks = chunks[:-12] + size + late + crc + chunks[-12:]
    x = one(f, chunks)[0]
    assert x.shape == (12, 8) and np.abs(x - np.arange(224., -1, -32)).max() < 6, late

def put(path, value=0, size=(8, 8), **how):
  path.parent.mkdir(parents=True, exist_ok=True)
  img = value if isinstance(value, Image.Image) else Image.new("L", size, value)
  img.save(path, **how)

def test_classes_splits_and_hidden_files(offline):
  for path, value in (("d/top.png", 1), ("d/b/2.PNG", 2), ("d/b/deep/er/3.JPEG", 3), ("d/a/4.webp", 4),
                      ("d/.h/5.png", 5), ("d/b/._6.png", 6), ("d/b/text.txt", 7)):
    put(offline / path, value, format="PNG")
  (offline / "d" / "b" / "loop").symlink_to(offline / "d")
  (offline / "linked").mkdir()
  put(offline / "linked/8.png", 8)
  (offline / "d" / "c").symlink_to(offline / "linked")
  (offline / "d" / "nowhere.png").symlink_to(offline / "gone.png")
  os.mkfifo(offline / "d" / "pipe.png")  # would wait for ever
  x, y = data.load(str(offline / "d"))
  assert x.shape == (5, 1, 8, 8)
  assert sorted(zip(x[:, 0, 0, 0].tolist(), y.tolist())) == [(1, 0), (2, 2), (3, 2), (4, 1), (8, 3)]
  for split in ("train", "test"): assert np.array_equal(data.load(offline / "d", split)[0], x)  # a Path; both splits
  found = data.read(offline / "d")
  assert not found.heldout and found.classes == ["", "a", "b", "c"] and "1 of .txt" in found.about
  assert "links to nowhere, left out: nowhere.png" in found.about
  assert "by another name, left out: b/loop" in found.about

def test_what_links_lead_to_and_what_is_no_link_keep_their_names(offline):
  put(offline / "d/cat/1.png", 1)
  for name in ("a", "kitty"): (offline / "d" / name).symlink_to("cat")
  (offline / "d" / "dog").symlink_to(offline / "gone")  # a class on a disk that is not there
  found = data.read(offline / "d")
  assert found.classes == ["cat"] and "by another name, left out: a, kitty" in found.about
  assert "links to nowhere, left out: dog" in found.about
  (offline / "gone").mkdir()
  put(offline / "gone/2.png", 2)
  assert data.read(offline / "d").classes == ["cat", "dog"]

@pytest.mark.parametrize("held", ["test", "val", "valid", "validation", "Dev"])
def test_a_folder_beside_train_is_held_out(offline, held):
  for path, value in (("train/cat/1.png", 1), ("train/dog/2.png", 2), (f"{held}/dog/3.png", 3), ("more/4.png", 4),
                      ("5.png", 5)): put(offline / "s" / path, value)
  train, test = data.read(offline / "s"), data.read(offline / "s", "test")
  assert train.images[:, 0, 0, 0].tolist() == [1, 2] and train.labels.tolist() == [0, 1] and train.heldout
  assert test.images[:, 0, 0, 0].tolist() == [3] and test.labels.tolist() == [1]  # a dog is a dog, without a cat here
  assert train.classes == test.classes == ["cat", "dog"] and train.digest != test.digest
  assert f"2 in train, 1 held out in {held.lower()}" in train.about and "2 images outside" in train.about

def test_a_folder_around_all_is_no_class(offline):
  for path, value in (("all/train/cat/1.png", 1), ("all/train/dog/2.png", 2), ("all/val/dog/3.png", 3)):
    put(offline / path, value)
  with zipfile.ZipFile(offline / "a.zip", "w") as z:
    for file in sorted((offline / "all").rglob("*.png")): z.write(file, file.relative_to(offline))
  found = data.read(offline / "a.zip", "test")
  assert found.heldout and found.classes == ["cat", "dog"] and found.labels.tolist() == [1]
  put(offline / "all" / "cover.png", 4)  # one beside them changes nothing
  with zipfile.ZipFile(offline / "b.zip", "w") as z:
    for file in sorted((offline / "all").rglob("*.png")): z.write(file, file.relative_to(offline))
  found = data.read(offline / "b.zip")
  assert found.heldout and found.classes == ["cat", "dog"] and "1 images outside of train and val" in found.about
  for path in ("train/all/cat", "train/all/dog", "val/all/dog", "more"): put(offline / "in" / path / "1.png")
  found = data.read(offline / "in", "test")
  assert found.classes == ["cat", "dog"] and found.labels.tolist() == [1]
  put(offline / "one" / "cat" / "1.png")
  assert data.read(offline / "one").classes == ["cat"]
  put(offline / "first" / "test" / "1.png")  # test/ without train/ is a class
  put(offline / "first" / "other" / "1.png")
  assert data.read(offline / "first").classes == ["other", "test"] and not data.read(offline / "first").heldout

def test_of_two_held_out_folders_the_test_is_taken(offline):
  for i, half in enumerate(("train", "val", "test")): put(offline / "d" / half / f"{i}.png", i)
  assert data.read(offline / "d", "test").images.ravel()[0] == 2
  assert "1 images outside" in data.read(offline / "d").about

def test_numbers_in_numeric_order_and_classes_in_names(offline):
  for c in (0, 2, 10, 11, 1): put(offline / "n" / str(c) / "a.png", c)
  put(offline / "n" / "other" / "a.png", 99)
  found = data.read(offline / "n")
  assert found.classes == ["0", "1", "2", "10", "11", "other"]
  assert found.images[:, 0, 0, 0].tolist() == [[0, 1, 2, 10, 11, 99][i] for i in found.labels]
  for i in range(6): put(offline / "p" / f"{('dog', 'cat')[i % 2]}_{i}.png", i)
  found = data.read(offline / "p")
  assert found.classes == ["cat", "dog"] and all(found.images[:, 0, 0, 0] % 2 == 1 - found.labels)
  assert "beginnings of the names" in found.about
  for i in range(6): put(offline / "u" / f"{('кот', 'пёс')[i % 2]}_{i}.png", i)
  assert data.read(offline / "u").classes == ["кот", "пёс"]
  put(offline / "p" / "5.png")
  assert data.read(offline / "p").classes == [""]
  for i in (3, 4): put(offline / "n" / f"{i}.png")
  found = data.read(offline / "n")
  assert "" in found.classes and "a class for the 2 images in no sub-folder" in found.about
  for i in range(3): put(offline / "q" / f"{'abc'[i]}_{i}.png")  # a name for each is no class
  assert data.read(offline / "q").classes == [""]

def make_zip(path, labels=None, names=("00000/a.png", "00000/b.png", "00001/c.png")):
  with zipfile.ZipFile(path, "w") as z:
    for i, name in enumerate(names):
      blob = io.BytesIO()
      Image.new("L", (8, 8), i).save(blob, "PNG")
      z.writestr(name, blob.getvalue())
    if isinstance(labels, list): labels = json.dumps({"labels": labels})
    if labels: z.writestr("dataset.json", labels)
  return path

def test_archives(offline):
  found = data.read(make_zip(offline / "a.ZIP"))
  assert found.classes == ["00000", "00001"] and found.labels.tolist() == [0, 0, 1]
  assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2]
  names = ["00000/a.png", "00000/b.png", "00001/c.png"]
  found = data.read(make_zip(offline / "b.zip", [[name, label] for name, label in zip(names, (4, 0, 2))]))
  assert found.labels.tolist() == [4, 0, 2] and found.classes == list("01234")
  with zipfile.ZipFile(offline / "b.zip") as z: z.extractall(offline / "b")
  assert np.array_equal(data.read(offline / "b").labels, found.labels)
  assert data.read(offline / "b").digest == found.digest  # of the data, not of its place
  assert data.read(make_zip(offline / "c.zip", "{\"labels\": null}")).classes == [""]
  assert data.read(make_zip(offline / "c.zip", [[name, None] for name in names])).classes == [""]
  found = data.read(make_zip(offline / "w.zip", [[name, word] for name, word in zip(names, ("dog", "cat", "dog"))]))
  assert found.labels.tolist() == [1, 0, 1] and found.classes == ["cat", "dog"]
  above = data.read(make_zip(offline / "above.zip", names=["../a/1.png", "../b/1.png", "c/1.png"]))
  assert len(above.images) == 3 and above.classes == ["a", "b", "c"] and "left out" not in above.about
  twice = data.read(make_zip(offline / "twice.zip", names=["../a/1.png", "a/1.png", "b/1.png"]))
  assert len(twice.images) == 2 and "files whose name a later one has, left out: a/1.png" in twice.about
  class Unmarked(zipfile.ZipInfo):  # as most programs write it
    def _encodeFilenameFlags(self): return self.filename.encode(code), 0
  for code, classes in (("utf8", ["café", "日本"]), ("cp437", ["café", "zoë"])):
    with zipfile.ZipFile(offline / f"{code}.zip", "w") as z:
      for name in classes: z.writestr(Unmarked(f"{name}/1.png"), png(8, 8, 8, bytes(9 * 8)))
    assert data.read(offline / f"{code}.zip").classes == classes
  found = data.read(make_zip(offline / "backslashes.zip", names=["a\\1.png", "b\\1.png"]))
  assert found.classes == ["a", "b"]
  for labels, words in (([[names[0], 1]], ("2 of 3", "00000/b.png")), ([[n, -1] for n in names], ("whole numbers",)),
                        ([[n, [0, 1]] for n in names], ("shape (3, 2)",)),
                        ([[n, 0.5] for n in names], ("whole numbers",)), ("{", ()), ("[]", ()),
                        ("{\"labels\": 3}", ()), ("{}", ("[[name, label], ...]",))):
    refused(lambda: data.read(make_zip(offline / "d.zip", labels)), "d.zip", "dataset.json", *words)
  refused(lambda: data.read(make_zip(offline / "e.zip", names=["a.txt"])), "e.zip", "no images", "1 of .txt")
  blob = bytearray((offline / "a.ZIP").read_bytes())
  for name in names[1:]: blob[blob.index(name.encode()) + 40] ^= 1
  (offline / "damaged.zip").write_bytes(blob)
  assert "2 of 3 images cannot be read, Bad CRC-32 for file: 00000/b.png, 00001/c.png" in data.read(
    offline / "damaged.zip").about
  make_zip(offline / "f.zip", names=["a.png", "__MACOSX/._a.png", ".b.png"])
  assert len(data.read(offline / "f.zip").images) == 1

def test_arrays_and_their_layouts(offline):
  rng = np.random.default_rng(0)
  for shape, layout in (((6, 8, 9), "N, H, W"), ((6, 8, 9, 3), "N, H, W, C"), ((6, 3, 8, 9), "N, C, H, W"),
                        ((6, 8, 8, 5), "N, H, W, C"), ((6, 5, 8, 8), "N, C, H, W"), ((6, 16, 8, 8), "N, C, H, W"),
                        ((6, 4, 4, 16), "N, H, W, C"), ((6, 8, 8, 8), "N, C, H, W"), ((6, 2, 9, 2), "N, C, H, W")):
    x = rng.integers(0, 256, shape, np.uint8)
    want = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if layout.endswith("W, C") else x
    np.save(offline / "x.npy", x)
    np.save(offline / "f.npy", np.asfortranarray(x))
    np.savez(offline / "a.npz", x)
    np.savez_compressed(offline / "b.npz", images=x, labels=np.arange(6))
    np.savez(offline / "c.npz", x=x, y=np.array(list("bacbac")))
    for source in (x, *(offline / name for name in ("x.npy", "f.npy", "a.npz", "b.npz", "c.npz"))):
      found = data.read(source)
      assert np.array_equal(found.images, want) and f"read as {layout}" in found.about.split("; ") and not found.heldout
      assert int(found.digest[:8], 16) == zlib.crc32(want.tobytes()) and found.images.dtype == np.uint8
    assert data.read(offline / "b.npz").labels.tolist() == list(range(6))
    assert found.labels.tolist() == [1, 0, 2] * 2 and found.classes == ["a", "b", "c"]
    assert not data.load(x)[1].any() and data.read(x, labels=np.arange(6)[:, None]).classes == list("012345")
    assert np.shares_memory(data.load(x)[0], x)
  for bad, words in ((np.zeros((3, 4)), "shape"), (np.zeros((0, 4, 4)), "shape"), (np.zeros((2, 4, 4)), "0"),
                     (np.full((2, 4, 4), np.nan), "32"), (np.zeros((2, 4, 4), complex), "complex"),
                     (np.zeros((2, 4, 4), "U1"), "<U1"), (np.zeros((2, 4, 4), object), ""), ([[1], [2, 3]], "array")):
    refused(lambda: data.read(bad), words)
    np.save(offline / "bad.npy", np.array(bad, dtype=object) if isinstance(bad, list) else bad)
    refused(lambda: data.read(offline / "bad.npy"), "bad.npy")
  for labels in (np.arange(5), np.full(6, -1), np.full(6, 0.5), np.full(6, 10**9), np.zeros((6, 10)),
                 np.array(["a", 1] * 3, object)):
    refused(lambda: data.read(x, labels=labels), "labels")
  for words in (list("bacbac"), np.array(list("bacbac"), object), np.array(list("bacbac"), "S")):
    assert data.read(x, labels=words).labels.tolist() == [1, 0, 2] * 2
  assert data.read(x, labels=Tensor([3, 1, 0, 0, 0, 2])).labels.tolist() == [3, 1, 0, 0, 0, 2]
  np.savez(offline / "y.npz", images=x, y=np.arange(6), z=x)
  assert "images from images; y not read; z not read" in data.read(offline / "y.npz").about
  refused(lambda: data.read(x, mode="gray"), "gray", "array")
  for source in ("glyphs", offline / "x.npy"): refused(lambda: data.read(source, labels=[1] * 6), "labels", "array")
  np.savez(offline / "d.npz", pictures=x)
  refused(lambda: data.read(offline / "d.npz"), "d.npz", "pictures", "arr_0")
  (offline / "e.npz").write_bytes(b"PK nothing")
  refused(lambda: data.read(offline / "e.npz"), "e.npz")
  refused(lambda: data.read(offline / "x.npy", mode="gray"), "x.npy", "gray")
  (offline / "x.txt").write_bytes(b"")
  refused(lambda: data.read(offline / "x.txt"), "x.txt", ".npz")

@pytest.mark.parametrize("kind, lo, hi", [
  (np.float32, -7.5, 3.25), (np.float64, -1e300, 1e300), (np.float64, 1e-9, 2e-9), (np.float16, 0, 1),
  (np.int16, -1000, 3000), (np.uint16, 0, 4095), (np.int64, 0, 99)])
def test_numbers_of_any_range(offline, kind, lo, hi):
  x = np.random.default_rng(0).uniform(0, 1, (5, 4, 6, 2)) * (hi / 2 - lo / 2) * 2 + lo
  x.flat[0], x.flat[1] = lo, hi
  x = x.astype(kind)
  np.save(offline / "x.npy", x)
  for source in (x, offline / "x.npy"):
    found = data.read(source)
    lo, hi = found.limits
    assert lo == x.min() and hi == x.max() and found.images.dtype == np.float32 and found.images.shape == (5, 2, 4, 6)
    assert found.images.min() == -1 and found.images.max() == 1 and "scaled to [-1, 1]" in found.about
    want = (x.astype(float) / (hi - lo) if hi - lo < np.inf else x / hi / 2) - lo / (hi / 2 - lo / 2) / 2
    assert np.abs(found.images.transpose(0, 2, 3, 1) - (want * 2 - 1)).max() < 1e-6
    if hi < 1e30:
      back = data.unscaled(found.images, found.limits)
      assert back.dtype == np.float32 and np.abs(back.transpose(0, 2, 3, 1) - x).max() <= 1e-6 * max(-lo, hi)
    assert np.array_equal(data.scaled(found.images), found.images)  # they go to the network as they are
    assert data.batch_at(*found[:2], 0, 3, 0)[0].dtype == np.float32
    refused(lambda: data.levels(found.images), "256 levels")
  refused(lambda: data.unscaled(np.array([np.nan]), (0., 1.)), "NaN")

def test_whole_numbers_up_to_255_are_levels(offline):
  x = np.random.default_rng(0).integers(0, 256, (5, 4, 6))
  found = data.read(x)
  assert found.images.dtype == np.uint8 and np.array_equal(found.images[:, 0], x) and found.limits is None
  assert np.array_equal(data.read(x > 99).images[:, 0], (x > 99) * 255)
  assert np.array_equal(data.unscaled(data.scaled(found.images), None), found.images)
  assert "int64 read as levels from 0 to 255" in found.about and "levels" not in data.read(x.astype(np.uint8)).about

def test_bytes_of_0_and_1_are_black_and_white(offline):
  mask = (np.random.default_rng(0).random((5, 4, 6)) > 0.5).astype(np.uint8)
  np.save(offline / "x.npy", mask)
  for source in (mask, offline / "x.npy"):
    found = data.read(source)
    assert np.array_equal(found.images[:, 0], mask * 255) and "0 and 1 read as black and white" in found.about
  assert mask.max() == 1 and np.array_equal(data.read(mask * 2).images[:, 0], mask * 2)
  dark = folder(offline / "dark", *map(Image.fromarray, mask))
  assert data.load(dark)[0].max() == 1 and "no pixel is above 1 of 255" in data.read(dark).about
  assert "above" not in data.read(folder(offline / "light", *map(Image.fromarray, mask * 2))).about

def test_classes_without_an_image_are_named(offline):
  x = np.zeros((4, 8, 8), np.uint8)
  assert "in 4 classes, 1 of them without an image (0);" in data.read(x, labels=[1, 2, 3, 1]).about
  assert "in 9 classes, 7 of them without an image (1, 2, 3, 4, 5, ...);" in data.read(x, labels=[0, 8, 0, 8]).about
  assert "in 2 classes;" in data.read(x, labels=[0, 1, 0, 1]).about

def test_transparency_is_said(offline):
  f = folder(offline / "f", Image.new("RGBA", (8, 8), (255, 0, 0, 99)), Image.new("RGB", (8, 8), (255, 0, 0)))
  assert "1 images with transparency put on white" in data.read(f).about.split("; ")

def test_arrays_are_resized_and_cut(offline):
  x = np.zeros((2, 6, 9, 5), np.float32)
  x[:, :, 3:6], x[0, 0, 0] = 10, -10
  np.save(offline / "x.npy", x)
  for source in (x, offline / "x.npy"):
    cut = data.read(source, multiple=4)
    assert np.array_equal(cut.images * 10, x[:, 1:5, :8].transpose(0, 3, 1, 2)) and "cut from 6x9 to 4x8" in cut.about
    crop = data.read(source, size=(6, 3))
    assert (crop.images == 1).all() and "2 of 2 images cropped" in crop.about
    pad = data.read(source, size=18, fit="pad").images[1]
    assert pad.shape == (5, 18, 18) and np.abs(pad).max() == 1
    assert (pad[:, :3] == -1).all() and (pad[:, -3:] == -1).all()
    assert data.read(source, size=(3, 30), fit="stretch").images.shape == (2, 5, 3, 30)

def folder(root, *images):
  root.mkdir()
  for i, img in enumerate(images): img.save(root / f"{i}.png")
  return root

def test_sizes_and_channels(offline):
  read = lambda name, images, **how: data.read(folder(offline / name, *images), **how)
  gray, wide = Image.new("L", (28, 28), 9), Image.new("L", (60, 20))
  wide.paste(255, (20, 0, 40, 20))  # white in the central square
  assert read("same", [gray, gray], multiple=4).images.shape == (2, 1, 28, 28)
  noise = np.random.default_rng(0).integers(0, 256, (23, 45), np.uint8)
  found = read("cut", [Image.fromarray(noise)] * 2, multiple=8)  # no resizing: the pixels are as they were
  assert np.array_equal(found.images[1, 0], noise[3:19, 2:42])
  assert "cut from 23x45 to 16x40, which 8 divides" in found.about
  assert np.array_equal(data.load(offline / "cut")[0][1, 0], noise)
  refused(lambda: data.load(offline / "cut", multiple=32), "23x45", "32x32", "size")
  assert read("large", [Image.new("L", (300, 200))]).images.shape == (1, 1, 200, 300)
  found = read("most", [gray, gray, wide], multiple=4)
  assert found.images.shape == (3, 1, 28, 28) and "1 of 3 images cropped and resized to 28x28" in found.about
  found = read("mixed", [wide, Image.new("L", (9, 9)), Image.new("L", (90, 21))], multiple=8)
  assert found.images.shape == (3, 1, 16, 16)  # median side 20, down to 16
  assert found.images[0].min() > 240  # the central part
  red, tall = Image.new("RGB", (1, 1), "red"), Image.new("L", (1, 3000))
  assert read("tiny", [red, tall], multiple=8).images.shape == (2, 3, 8, 8)
  assert read("huge", [Image.new("L", (300, 200)), Image.new("L", (200, 300))]).images.shape == (2, 1, 64, 64)
  found = read("given", [wide, gray], size=12)
  assert found.images.shape == (2, 1, 12, 12) and "2 of 2 images" in found.about
  assert data.load(offline / "given", size=(10, 30))[0].shape == (2, 1, 10, 30)  # height first
  pad, stretch = (data.read(offline / "given", size=(20, 20), fit=fit) for fit in ("pad", "stretch"))
  assert (pad.images[0, 0, :6] == 0).all() and (pad.images[0, 0, 8:12, 8:12] > 240).all() and "black" in pad.about
  assert (stretch.images[0, 0, :, 9:11] > 240).all() and (stretch.images[0, 0, :, :4] < 15).all()
  assert "resized to 14x14" in data.read(offline / "same", size=14).about.split("images ")[-1]  # nothing is cropped
  assert read("colour", [gray, Image.new("RGB", (28, 28), "red")]).images.shape == (2, 3, 28, 28)
  assert read("gray in colour", [gray.convert("RGB")]).images.shape == (1, 1, 28, 28)
  assert data.load(offline / "gray in colour", mode="rgb")[0].shape == (1, 3, 28, 28)
  assert data.load(offline / "colour", mode="gray")[0][1].ravel()[0] == 76  # the luma of red
  assert data.load(offline / "given", size=np.int64(9))[0].shape == (2, 1, 9, 9)
  for bad in (0, -3, 10**6): refused(lambda: data.load(offline / "given", size=bad), bad)
  for bad in ((8, 0), (5000, 8), (1, 2, 3)): refused(lambda: data.load(offline / "given", size=bad), "size")

def test_nearly_gray(offline):
  x = np.full((4, 50, 50, 3), 7, np.uint8)
  x[2, 3, 4] = 7, 8, 7  # one of 10,000 pixels is tinted
  where = folder(offline / "a", *map(Image.fromarray, x))
  found = data.read(where)
  assert found.images.shape == (4, 3, 50, 50) and "nearly gray" in found.about and "mode gray" in found.about
  assert data.read(where, mode="gray").images.shape == (4, 1, 50, 50)
  assert "nearly" not in data.read(where, mode="rgb").about
  x[2, 3] = 7, 8, 7
  assert "nearly" not in data.read(folder(offline / "b", *map(Image.fromarray, x))).about

def test_more_than_8_bits(offline):
  ramp = lambda top: np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
  save = lambda name, *arrays: folder(offline / name, *map(Image.fromarray, arrays))
  found = data.read(save("12", ramp(1000), ramp(4095)))  # by the greatest of all, not of each
  assert np.abs(found.images[1, 0] - ramp(4095) / 4095 * 255).max() <= 0.5 and found.images[0].max() == 62
  assert "values from 0 to 4095 made 0 to 255" in found.about
  found = data.read(save("16", ramp(40000)))  # above half of what 16 bits hold: as they are
  assert np.abs(found.images[0, 0] - ramp(40000) / 257).max() <= 0.5
  put(offline / "signed" / "a.tif", Image.fromarray(ramp(2000).astype(np.int32) - 1000))
  assert np.abs(data.load(offline / "signed")[0][0, 0] - ramp(2000) / 2000 * 255).max() <= 0.5
  put(offline / "float" / "a.tif", Image.fromarray((ramp(2000) / 500).astype(np.float32)))
  assert np.abs(data.load(offline / "float")[0][0, 0] - ramp(2000) / 2000 * 255).max() <= 0.5
  assert not data.load(save("zero", ramp(0)))[0].any()
  put(offline / "float" / "b.tif", Image.fromarray(np.array([[1, np.nan]], np.float32)))
  assert "1 of 2 images cannot be read, numbers that are not finite: b.tif" in data.read(offline / "float").about

def test_what_is_left_out_is_counted(offline, monkeypatch):
  f, gray = offline / "f", Image.new("L", (8, 8))
  for name in ("a.png", "b.jfif"): put(f / name, 3, format="JPEG" if "jfif" in name else None)
  for name in ("c.heic", "d.HEIC", "e.txt", "README"): (f / name).write_bytes(b"nothing")
  put(f / "pages.tif", gray, save_all=True, append_images=[gray] * 5)
  put(f / "film.gif", gray, save_all=True, append_images=[Image.new("L", (8, 8), i) for i in (50, 99)])
  about = data.read(f).about
  assert about.startswith("4 images of 1 x 8 x 8; ") and "4 files of other kinds left out (2 of .heic" in about
  assert "1 of .txt" in about and "1 of no suffix" in about and "7 further pages or frames in 2 of the files" in about
  walk = os.scandir
  def scandir(path):
    if str(path).endswith("closed"): raise PermissionError(13, "Permission denied", str(path))
    return walk(path)
  put(f / "closed" / "z.png")
  monkeypatch.setattr(os, "scandir", scandir)
  assert f"cannot be entered: {f / 'closed'} (Permission denied)" in data.read(f).about

def test_images_above_pillows_limit(offline, monkeypatch):
  for name in ("a.jpg", "b.png", "c.jpg"): put(offline / "f" / name, Image.new("RGB", (80, 48), "red"))
  put(offline / "f" / "c.jpg", Image.new("RGB", (80, 48), "red"), progressive=True)
  for limit in (3000, 1000):  # Pillow warns of images beyond the limit, and refuses those beyond its double
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (offline / "f" / "a.jpg").touch()
    found = data.read(offline / "f")
    assert found.images.shape == (1, 3, 6, 10) and "1 images above" in found.about and "an eighth" in found.about
    assert "2 of 3 images cannot be read, too large: b.png, c.jpg" in found.about

def test_large_photographs_look_the_same(offline):
  x = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8)).resize((900, 600), 3))
  put(offline / "f" / "a.jpg", Image.fromarray(x), quality=95)
  put(offline / "g" / "a.png", Image.fromarray(x))
  a, b = (data.load(offline / name, size=(20, 30))[0][0, 0].astype(int) for name in "fg")
  assert np.abs(a - b).max() < 6

def test_a_set_that_turns_out_gray_needs_the_room_of_one_channel(offline, monkeypatch):
  """Files of colour without any are written as three channels first, whose room is free again for the one."""
  for i in range(4): put(offline / "f" / f"{i}.png", Image.new("RGB", (100, 100), (i, i, i)))
  def free(place):
    used = sum(file.stat().st_size for file in Path(place).iterdir())
    return SimpleNamespace(free=130_000 - used)
  monkeypatch.setattr(dataset.shutil, "disk_usage", free)
  assert data.read(offline / "f").images.shape == (4, 1, 100, 100)

def test_names_of_any_length(offline):
  long = "照" * 84  # 252 bytes of the 255 that a name may have
  put(offline / long / "a.png", 7)
  assert data.read(offline / long).images.max() == 7

def test_broken_images_are_counted_and_named(offline, capsys):
  f = offline / "f"
  f.mkdir()
  refused(lambda: data.load(str(f)), f, "no images")
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
  for name in ("cut.png", "cut.jpg"):
    noise.save(f / name)
    (f / name).write_bytes((f / name).read_bytes()[:-400])
  (f / "empty.gif").write_bytes(b"")
  (f / "text.bmp").write_bytes(b"hello")
  (f / "bomb.png").write_bytes(png(60000, 60000))  # Pillow's error
  (f / "large.png").write_bytes(png(10000, 10000, 1, bytes(1251 * 10000)))  # Pillow's warning
  refused(lambda: data.load(str(f)), f, "all 6 are broken")
  noise.save(f / "good.png")
  capsys.readouterr()
  x, y = data.load(str(f))
  err = capsys.readouterr().err
  assert np.array_equal(x[0], np.asarray(noise).transpose(2, 0, 1)) and y.tolist() == [0]
  assert err.count("\n") == 1 and "2 of 7 images cannot be read, too large: bomb.png, large.png" in err
  assert all(file.name in err for file in f.iterdir() if file.stem != "good")

# *** the cache ***

def test_decoded_once(offline, monkeypatch):
  f, decoded = offline / "f", []
  for i in range(30): put(f / "ab"[i % 2] / f"{i}.png", i)
  decode = image_files.decode
  monkeypatch.setattr(image_files, "decode", lambda *args: decoded.append(1) or decode(*args))
  first = data.read(f)
  files = lambda: sorted((Path(os.environ["XDG_CACHE_HOME"]) / "ddpm" / "decoded").iterdir())
  assert len(decoded) == 30 and isinstance(first.images, np.memmap) and len(files()) == 1
  assert np.array_equal(np.load(files()[0]), first.images)  # any program can read it
  second = data.read(f"{f}/")
  assert len(decoded) == 30 and np.array_equal(second.images, first.images) and second[2:] == first[2:]
  assert np.array_equal(second.labels, first.labels)
  data.read(f, size=4)
  assert len(decoded) == 60 and len(files()) == 2  # another shape is another file
  put(f / "a" / "0.png", 99)
  third = data.read(f)
  assert len(decoded) == 90 and third.images[0].max() == 99 and third.digest != first.digest and len(files()) == 2
  assert first.images[0].max() == 0  # still mapped by whoever trains on it
  with pytest.raises(ValueError): third.images[:] = 0
  want = np.array(third.images)
  del first, second, third  # a mapped file must not be cut
  for harm in (b"", files()[0].read_bytes()[:-50], bytes(500), b"\xff" * 8):
    for file in files(): file.write_bytes(harm)
    assert np.array_equal(data.read(f).images, want)

def test_a_file_that_could_not_be_opened_is_tried_again(offline, monkeypatch):
  for i in range(3): put(offline / "f" / f"{i}.png", i)
  source = image_files.Source.open
  def closed(self, name):
    if name.name == "1.png": raise OSError(5, os.strerror(5))
    return source(self, name)
  with monkeypatch.context() as m:
    m.setattr(image_files.Source, "open", closed)
    assert f"1 of 3 images cannot be read, {os.strerror(5)}: 1.png" in data.read(offline / "f").about
  assert len(data.read(offline / "f").images) == 3

def test_a_full_disk_is_one_sentence(offline, monkeypatch):
  put(offline / "f" / "a.png", size=(64, 64))
  np.save(offline / "a.npy", np.zeros((9, 64, 64), np.uint8))
  monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
  for name in ("f", "a.npy"): refused(lambda: data.read(offline / name), "cannot write", "free", "XDG_CACHE_HOME")
  assert not list(Path(os.environ["XDG_CACHE_HOME"], "ddpm", "decoded").iterdir())
  monkeypatch.undo()
  program = f"""if True:
    import resource, data
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    data.load({str(offline / 'f')!r})"""
  env = os.environ | {"XDG_CACHE_HOME": str(offline / "xdg")}
  run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
  assert "OSError: cannot write" in run.stderr and not list((offline / "xdg" / "ddpm" / "decoded").iterdir())

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_set_larger_than_what_is_read_of_it_stays_on_the_disk(offline):
  rng, peaks = np.random.default_rng(0), []
  for n in (6000, 12000):
    np.save(offline / f"{n}.npy", rng.integers(0, 256, (n, 64, 64, 3), np.uint8))
    program = f"""if True:
      import data
      from files import dataset
      used, mapped, release = [], [], dataset.release  # which is called for each piece that was read
      def noted(x):
        resident, shared = map(int, open("/proc/self/statm").read().split()[1:3])  # a mapped file's pages are shared
        used.append(resident - shared)
        release(x)
        mapped.append(int(open("/proc/self/statm").read().split()[2]))
      dataset.release = noted
      x, y = data.load({str(offline / f"{n}.npy")!r})
      for step in range({n} // 100): data.batch_at(x, y, step, 100, 0)
      assert len(used) > {n} // 100
      print(max(used), max(mapped))"""
    env = os.environ | {"XDG_CACHE_HOME": str(offline / "xdg")}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, check=True)
    peaks.append(np.array(run.stdout.split(), int) * resource.getpagesize() / 2**20)
  assert (abs(peaks[1] - peaks[0]) < 50).all()  # MB, a few pieces; the second is larger by 74

def test_any_damage_is_read_or_refused(offline):
  """Bytes flipped, cut out and put in, at random: a result or one sentence, never another error."""
  rng, cases, read = np.random.default_rng(0), 0, 0
  def harmed(blob):
    blob, where = bytearray(blob), int(rng.integers(len(blob)))
    how = rng.integers(4)
    if how == 0: blob[where] ^= 1 << int(rng.integers(8))
    if how == 1: del blob[where:where + int(rng.integers(1, 40))]
    if how == 2: blob[where:where] = rng.bytes(int(rng.integers(1, 40)))
    if how == 3: blob[where:where + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(blob)
  def attack(file, times, call):
    nonlocal cases, read
    good = file.read_bytes()
    for _ in range(times):
      file.write_bytes(harmed(good))
      cases += 1
      try: x, y = call()
      except (ValueError, OSError) as e:
        assert type(e) in (ValueError, OSError) and "\n" not in str(e) and str(offline) in str(e)
      else:
        read += 1
        assert x.dtype == np.uint8 and x.ndim == 4 and y.dtype == np.int32 and len(x) == len(y) > 0
    file.write_bytes(good)
  for end, pack in (("", bytes), (".gz", gzip.compress)):
    write_idx(offline / end.strip(".") / "idx", n=2, pack=pack, end=end)
    for file in (offline / end.strip(".") / "idx").iterdir():
      attack(file, 40, lambda: data.load("mnist", data_dir=file.parent))
  noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
  for end in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm"):
    (offline / end).mkdir()
    noise.save(offline / end / f"a.{end}")
    attack(offline / end / f"a.{end}", 40, lambda: data.load(str(offline / end)))
  write_jpegs(offline / "cifar10-jpg-test.zip")
  attack(offline / "cifar10-jpg-test.zip", 40, lambda: data.load("cifar10", "test", offline))
  (offline / "tar").mkdir()
  write_cifar(offline / "tar", n=1)
  attack(offline / "tar" / "cifar-10-binary.tar.gz", 30, lambda: data.load("cifar10", "test", offline / "tar"))
  np.save(offline / "a.npy", np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3))
  np.savez(offline / "a.npz", np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), np.array([3]))
  make_zip(offline / "a.zip", [["00000/a.png", 1], ["00000/b.png", 0], ["00001/c.png", 1]])
  for end in ("npy", "npz", "zip"): attack(offline / f"a.{end}", 60, lambda: data.load(offline / f"a.{end}"))
  assert cases >= 300 and cases / 10 < read < cases * 0.9

# *** batches ***

@pytest.mark.parametrize("batch", [1, 4, 10, 7, 33])
def test_each_epoch_has_every_image_once(batch):
  images, labels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32) * 2
  steps = [data.batch_at(images, labels, step, batch, seed=3) for step in range(10)]
  assert all(x.shape == (batch, 1, 1, 1) and x.dtype == np.uint8 and y.dtype == np.int32 for x, y in steps)
  stream = np.concatenate([x.ravel() for x, _ in steps])
  assert all((x.ravel() * 2 == y).all() for x, y in steps)
  epochs = [stream[i:i + 10].tolist() for i in range(0, len(stream) - 9, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(epochs) == 1 or len(set(map(tuple, epochs))) > 1  # and in a new order

def test_a_batch_depends_on_seed_and_step_alone():
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (50, 3, 4, 5), np.uint8), np.arange(50, dtype=np.int32)
  get = lambda step, seed=0: data.batch_at(images, labels, step, 16, seed, flip=True)
  forwards = [get(step) for step in range(12)]
  data.permutation.cache_clear()
  for step in reversed(range(12)):
    get(99 - step, seed=step)  # something else in between
    assert all(np.array_equal(a, b) for a, b in zip(get(step), forwards[step]))
  assert not np.array_equal(get(0)[1], get(0, seed=1)[1])
  assert np.array_equal(images, np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), np.uint8))  # left untouched

def test_flips_mirror_half_of_the_images():
  images, labels = np.random.default_rng(0).integers(0, 256, (500, 3, 4, 6), np.uint8), np.arange(500, dtype=np.int32)
  masks = []
  for step in range(8):
    x, y = data.batch_at(images, labels, step, 250, 0, flip=True)
    plain, same = data.batch_at(images, labels, step, 250, 0)
    assert np.array_equal(y, same) and np.array_equal(plain, images[y])
    masks.append((x != plain).any((1, 2, 3)))
    assert np.array_equal(x[masks[-1]], np.flip(plain[masks[-1]], 3))
  assert 900 < np.sum(masks) < 1100 and not np.array_equal(masks[0], masks[1])  # 1000 of 2000, sigma 22

def test_batches_that_cannot_be(offline):
  images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int32)
  for step, batch, seed in ((0, 0, 0), (-1, 2, 0), (0, 2, -1)):
    refused(lambda: data.batch_at(images, labels, step, batch, seed), f"batch of {batch}")
  refused(lambda: data.batch_at(images[:0], labels[:0], 0, 2, 0), "0 images")

def test_to_uint8_inverts_the_scaling():
  every = np.arange(256)
  assert np.array_equal(data.to_uint8((every / 127.5 - 1).astype(np.float32)), every)
  levels = data.scaled(every.astype(np.uint8))
  assert levels.dtype == np.float32 and np.abs(levels - (every / 127.5 - 1)).max() < 1e-7
  assert np.array_equal(data.to_uint8(levels), every) and levels[[0, 255]].tolist() == [-1, 1]
  x = np.random.default_rng(0).uniform(-1, 1, 1000)
  assert np.abs(data.to_uint8(x) - (x + 1) * 127.5).max() <= 0.5 and data.to_uint8(x).dtype == np.uint8
  assert data.to_uint8(np.array([-1.01, -9, -np.inf, 1.01, 9, np.inf])).tolist() == [0, 0, 0, 255, 255, 255]
  refused(lambda: data.to_uint8(np.array([0, np.nan])), "NaN")
