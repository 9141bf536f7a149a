"""Section 4's set-up: datasets, downloads, folders of images, batches."""
import contextlib, gzip, hashlib, http.server, io, os, re, subprocess, sys, tarfile, threading, tracemalloc
import zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import data
import numpy as np
import pytest
from common import DATA, ROOT, refused
from PIL import Image

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
  for file, sha in data.SHA256["mnist"].items():
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
      assert data.CIFAR10_CLASSES[y[i]] == names[i].split("/")[1]

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
  refused(lambda: data.load("minst"), "minst", *data.DATASETS, "or a folder of images")
  for name in ("", "\0", "x" * 5000): refused(lambda: data.load(name))
  refused(lambda: data.load("glyphs", "validation"), "validation", "train", "test")
  refused(lambda: data.load("mnist", data_dir=offline / "gone"), offline / "gone")
  refused(lambda: data.load("mnist", size=16), "mnist", "size")
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
    for i, name in enumerate(data.CIFAR10_CLASSES):
      blob = io.BytesIO()
      Image.new("L", (32, 32), i * 20).save(blob, "JPEG", quality=95)
      if name != skip: z.writestr(f"test/{name}/0001.jpg", blob.getvalue())

def test_cifar10_jpegs_zipped_and_unpacked(offline, capsys, monkeypatch):
  file = offline / "cifar10-jpg-test.zip"
  write_jpegs(file)
  x, y = data.load("cifar10", "test", offline)
  assert x.shape == (10, 3, 32, 32) and y.tolist() == list(range(10))  # three channels, even if all are gray
  assert np.abs(x.mean((1, 2, 3)) - np.arange(10) * 20).max() < 1 and "lossy" in capsys.readouterr().err
  with zipfile.ZipFile(file) as z: z.extractall(offline / "cifar10")
  file.unlink()
  assert np.array_equal(data.load("cifar10", "test", offline)[0], x)
  write_jpegs(offline / "cifar10" / file.name, skip="deer")
  refused(lambda: data.load("cifar10", "test", offline / "cifar10"), file.name, "deer")
  write_jpegs(offline / "cifar10" / file.name)
  with monkeypatch.context() as m:
    m.setattr(data, "LIMIT", 100)  # larger files in the archive are not unpacked
    refused(lambda: data.load("cifar10", "test", offline / "cifar10"), "all 10")
  (offline / "cifar10" / file.name).write_bytes(b"PK not a zip")
  refused(lambda: data.load("cifar10", "test", offline / "cifar10"), file.name)

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
  monkeypatch.setitem(data.MIRRORS, "mnist", [f"{base}{how}/" for how in ("dead", "cut", "altered", "good")])
  monkeypatch.setitem(data.SHA256, "mnist", {"train-images-idx3-ubyte.gz": hashlib.sha256(idx(images)).hexdigest(),
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
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(data.SHA256["mnist"])
  (tmp_path / "xdg/ddpm/mnist/train-labels-idx1-ubyte.gz").unlink()
  assert np.array_equal(data.load("mnist")[0][:, 0], images) and len(asked) == 12  # only what is missing

def test_a_wrong_download_never_enters_the_cache(mirrors, monkeypatch):
  _, asked, tmp_path = mirrors
  monkeypatch.setitem(data.MIRRORS, "mnist", data.MIRRORS["mnist"][:3])
  refused(lambda: data.load("mnist"), "train-images-idx3-ubyte.gz", "404", "SHA-256")
  assert len(asked) == 3 and not list((tmp_path / "xdg/ddpm/mnist").iterdir())
  monkeypatch.setattr(data, "LIMIT", 100)
  refused(lambda: data.load("mnist"), "too long")

def test_two_downloads_at_once(mirrors):
  images, _, tmp_path = mirrors
  program = f"""if True:
    import data
    data.MIRRORS["mnist"], data.SHA256["mnist"] = {data.MIRRORS["mnist"]}, {data.SHA256["mnist"]}
    print(data.load("mnist")[0].sum(dtype=int))"""
  programs = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
  assert [int(p.communicate()[0]) for p in programs] == [images.sum(dtype=int)] * 2
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(data.SHA256["mnist"])
  for file in data.SHA256["mnist"]: (tmp_path / "xdg/ddpm/mnist" / file).unlink()
  with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: data.load("mnist")[0], range(4)))
  assert all(np.array_equal(x[:, 0], images) for x in found)
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(data.SHA256["mnist"])

def test_digest_of_the_file_itself_and_the_published_names(mirrors, monkeypatch):
  images, _, tmp_path = mirrors
  blobs = {name: (tmp_path / "served" / name).read_bytes() for name in data.SHA256["mnist"]}
  monkeypatch.setitem(data.SHA256, "mnist", {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()})
  assert np.array_equal(data.load("mnist")[0][:, 0], images)
  for name in ("mnist", "fashion_mnist", "cifar10"):
    assert len(data.MIRRORS[name]) >= 2 and all(re.fullmatch("[0-9a-f]{64}", sha) for sha in data.SHA256[name].values())

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

def test_classes_splits_and_hidden_files(offline):
  def put(path, value, size=8):
    (offline / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(offline / path, "PNG")
  for path, value in (("d/top.png", 1), ("d/b/2.PNG", 2), ("d/b/deep/er/3.JPEG", 3), ("d/a/4.webp", 4),
                      ("d/.h/5.png", 5), ("d/b/._6.png", 6), ("d/b/text.txt", 7)): put(path, value)
  (offline / "d" / "b" / "loop").symlink_to(offline / "d")
  (offline / "linked").mkdir()
  put("linked/8.png", 8)
  (offline / "d" / "c").symlink_to(offline / "linked")
  os.mkfifo(offline / "d" / "pipe.png")  # would wait for ever
  x, y = data.load(str(offline / "d"))
  assert x.shape == (5, 1, 8, 8)
  assert sorted(zip(x[:, 0, 0, 0].tolist(), y.tolist())) == [(1, 0), (2, 2), (3, 2), (4, 1), (8, 3)]
  for split in ("train", "test"): assert np.array_equal(data.load(offline / "d", split)[0], x)  # a Path; both splits
  for path, value in (("s/train/cat/1.png", 1), ("s/train/dog/2.png", 2), ("s/test/dog/3.png", 3), ("s/val/4.png", 4)):
    put(path, value)
  x, y = data.load(str(offline / "s"), "test")
  assert x[:, 0, 0, 0].tolist() == [3] and y.tolist() == [1]  # a dog is a dog, though this half has no cat
  assert data.load(str(offline / "s"))[0][:, 0, 0, 0].tolist() == [1, 2]

def test_folder_sizes_and_channels(offline):
  def folder(name, *images):
    (offline / name).mkdir()
    for i, img in enumerate(images): img.save(offline / name / f"{i}.png")
    return str(offline / name)
  gray, wide = Image.new("L", (28, 28), 9), Image.new("L", (60, 20))
  wide.paste(255, (20, 0, 40, 20))  # white in the central square
  assert data.load(folder("same", gray, gray), multiple=4)[0].shape == (2, 1, 28, 28)
  assert data.load(folder("most", gray, gray, wide), multiple=4)[0].shape == (3, 1, 28, 28)
  x = data.load(folder("mixed", wide, Image.new("L", (9, 9)), Image.new("L", (90, 21))))[0]
  assert x.shape == (3, 1, 16, 16) and x[0].min() > 240  # median side 20, down to 16; central crop
  assert data.load(folder("large", Image.new("L", (300, 200))))[0].shape == (1, 1, 64, 64)
  assert data.load(folder("tiny", Image.new("RGB", (1, 1), "red"), Image.new("L", (1, 3000))))[0].shape == (2, 3, 8, 8)
  assert data.load(folder("given", wide, gray), size=12)[0].shape == (2, 1, 12, 12)
  assert data.load(folder("colour", gray, Image.new("RGB", (28, 28), "red")))[0].shape == (2, 3, 24, 24)
  for own, multiple, size in ((512, 8, 64), (50, 8, 48), (50, 4, 48), (50, 2, 50), (28, 16, 16), (5, 16, 16)):
    name = folder(f"{own} by {multiple}", Image.new("L", (own, own)))
    assert data.load(name, multiple=multiple)[0].shape == (1, 1, size, size)
    assert data.load(name, size=own, multiple=multiple)[0].shape == (1, 1, own, own)  # what is asked for
  for bad in (0, -3, 10**6): refused(lambda: data.load(str(offline / "given"), size=bad), bad)

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
  assert err.count("\n") == 1 and "6 of 7" in err
  assert all(file.name in err for file in f.iterdir() if file.stem != "good")

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
