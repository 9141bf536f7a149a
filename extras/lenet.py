"""LeNet-5 as a judge of samples: how far their features lie from those of images, and whether they are training images.

evaluate.py's --lenet and --nearest. Not in the paper, which uses FID, by a network of 24 million weights.
"""
import sys
import numpy as np
from tinygrad import Context, Device, Tensor, nn
import data
from engine import hosts
from engine.batches import in_batches
from engine.capture import captured, placed
from engine.streams import stream
from engine.terminal import table
from files import pictures
from files.bar import progress
from files.dataset import cache
from files.weights import fill, open_tensors, write_tensors
from unet import convolve, fan_average, linear

EPOCHS, BATCH, RATE = 10, 32, 1e-3  # as DenoisingDiffusion.jl trains its own
SEEDS, SURE = 3, 0.99

class LeNet:
  """LeNet-5 (LeCun et al. 1998) with ReLU and maxima: x (B, C, H, W) in [0, 1] -> 84 features (B, 84), and logits.

  ValueError for images of less than 16 pixels a side."""
  def __init__(self, shape:tuple[int, ...], classes:int, seed:int):
    if min(shape[1:]) < 16: raise ValueError(f"LeNet needs images of 16x16 pixels or more, not {shape[1]}x{shape[2]}")
    h, w = [((side - 4) // 2 - 4) // 2 for side in shape[1:]]
    sizes = (5, 5, shape[0], 6), (5, 5, 6, 16), (h * w * 16, 120), (120, 84), (84, classes)
    rng = stream(seed, "LeNet")
    self.weights = [fan_average(rng, *size).realize() for size in sizes]
    self.biases = [Tensor(np.zeros(size[-1], np.float32)).realize() for size in sizes]

  def __call__(self, x:Tensor) -> tuple[Tensor, Tensor]:
    (w1, w2, w3, w4, w5), (b1, b2, b3, b4, b5) = self.weights, self.biases
    x = halved(convolve(x.permute(0, 2, 3, 1), w1, b1.reshape(1, 1, 1, -1)))
    x = halved(convolve(x, w2, b2.reshape(1, 1, 1, -1)))
    features = linear(linear(x.flatten(1), w3, b3).relu(), w4, b4).relu()
    return features, linear(features, w5, b5)

def halved(x:Tensor) -> Tensor:
  """ReLU and the largest of 2x2 pixels: x (B, H, W, C), of a 5x5 convolution, without the edge that saw zeros."""
  B, H, W, C = x.shape
  h, w = (H - 4) // 2, (W - 4) // 2
  return x[:, 2:2+2*h, 2:2+2*w].reshape(B, h, 2, w, 2, C).max((2, 4)).relu().contiguous()

def trained(known:data.Dataset, seed:int) -> LeNet:
  """A LeNet that tells the classes of a dataset of 8 bits apart: 10 epochs of Adam, in a minute or two; or from the
  cache, where each seed's is kept."""
  path = cache()/f"lenet-{known.digest}-{seed}.safetensors"
  net = LeNet(known.images.shape[1:], len(known.classes), seed)
  if path.exists():
    fill(nn.state.get_state_dict(net), open_tensors(path)[0], path)
    return net
  adam = nn.optim.Adam(nn.state.get_parameters(net), lr=RATE)
  for v in nn.state.get_parameters(adam): v.replace(v.clone().realize())  # a captured step needs buffers
  def step(x:Tensor, y:Tensor) -> Tensor:
    adam.zero_grad()
    loss = net(x / 255)[1].sparse_categorical_crossentropy(y)
    loss.backward()
    adam.step()
    return loss.realize()
  learn, n = captured(step), len(known.images)
  steps = EPOCHS * n // BATCH
  for i in progress(range(steps), f"training LeNet {seed}", steps):
    x, y = data.batch_at(known.images, known.labels, i, BATCH, seed)
    with Context(TRAINING=1): learn(placed(x, Device.DEFAULT), placed(y, Device.DEFAULT))
  write_tensors(path, {k: v.numpy() for k, v in nn.state.get_state_dict(net).items()}, {})
  return net

def answers(net:LeNet, images:np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The features (n, 84) of uint8 images (n, C, H, W), and the probability of each class, (n, classes)."""
  def step(x:Tensor) -> Tensor:
    features, logits = net(x / 255)
    return features.cat(logits.softmax(), dim=1).T.realize()
  ask = captured(step)
  found = in_batches(lambda i, tick: ask(placed(images[i], Device.DEFAULT)).numpy(), len(images), 1000).T
  return found[:, :84], found[:, 84:]

def frechet(a:np.ndarray, b:np.ndarray) -> float:
  """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), the Fréchet distance of two sets of features (n, d), each taken for a
  normal distribution (Dowson & Landau 1982): what FID is of Inception's features."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  A, B = np.cov(a.T), np.cov(b.T)
  w, v = np.linalg.eigh(A)
  root = v * np.sqrt(w.clip(0)) @ v.T  # (Σ_a Σ_b)^½ has the trace of (Σ_a^½ Σ_b Σ_a^½)^½
  cross = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
  return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A) + np.trace(B) - 2 * cross)

def report_lenet(samples:np.ndarray, real:np.ndarray|None, found:data.Dataset, known:data.Dataset, split:str) -> dict:
  """--lenet at the terminal, by LeNets trained on `known`: the distance of samples, and of training images `real`, if
  given, from the images `found`; of how many a LeNet is sure, and how often it is right. All uint8 (n, C, H, W).
  Returns them by name."""
  about = {"Fréchet_LeNet_distance": f"{len(samples)} samples to {len(found.images)} {split} images; by another "
                                     "LeNet it is another"}
  if real is not None: about["of_training_images"] = f"the distance of {len(real)} training images"
  about |= {"sure": f"% of samples of which a LeNet is sure (probability > {SURE})",
            f"sure_of_{split}_images": f"% of {split} images"}
  same_classes = found.classes == known.classes
  if same_classes: about[f"right_of_{split}_images"] = f"% of {split} images whose class a LeNet knows"
  rows = []
  for seed in range(SEEDS):
    net = trained(known, seed)
    (a, p), (b, q) = answers(net, samples), answers(net, found.images)
    distances = [frechet(x, b) for x in ([a] if real is None else [a, answers(net, real)[0]])]
    shares = [(v.max(1) > SURE).mean() for v in (p, q)] + [(q.argmax(1) == found.labels).mean()] * same_classes
    rows.append(distances + [100 * share for share in shares])
  names, mean, spread = [*about], np.mean(rows, 0), np.std(rows, 0, ddof=1)
  table(**{name: (m, f"± {s:.3f} over {SEEDS} LeNets: {about[name]}") for name, m, s in zip(names, mean, spread)})
  return {name: {"mean": m, "each": [row[i] for row in rows]} for i, (name, m) in enumerate(zip(names, mean))}

# *** are they training images? ***

def nearest(a:np.ndarray, b:np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """For each row of a (n, d) the row of b (m, d) that is nearest, (n,), and its distance, (n,), over √d. b may be
  mapped and larger than the memory."""
  def flat(x:np.ndarray) -> np.ndarray: return x.reshape(len(x), -1).astype(np.float32)
  a, index, least = flat(a), np.zeros(len(a), int), np.full(len(a), np.inf, np.float32)
  starts = range(0, len(b), 2000)
  for start in progress(starts, "nearest images", len(starts)):
    part = flat(b[start:start + 2000])
    far = np.square(part).sum(1) - 2 * a @ part.T  # ‖a − b‖² without ‖a‖²
    found, nearer = far.argmin(1), far.min(1) < least
    index[nearer], least[nearer] = start + found[nearer], far.min(1)[nearer]
  return index, np.sqrt(np.square(a - flat(b[index])).mean(1))

def report_nearest(samples:np.ndarray, known:data.Dataset, tests:np.ndarray|None, k:int, path:str) -> dict:
  """--nearest at the terminal: the distances of samples to the nearest training image, and those of test images, if
  there are some that were not trained on. And a picture: the k samples that are nearest of all, with the training image
  that is nearest in pixels and, where there are classes, in LeNet's features; below, how the distances spread."""
  index, distance = nearest(samples, known.images)
  sets = {"samples": np.sort(distance)}
  if tests is not None: sets["test images"] = np.sort(nearest(tests, known.images)[1])
  for name, v in sets.items():
    about = f"of 255, the median; 1% below {np.quantile(v, 0.01):.2f}, the least {v[0]:.2f}, of {len(v)}"
    table(**{f"nearest training image, {name}": (np.median(v), about)})
  closest = distance.argsort(kind="stable")[:k]
  rows, names = [samples[closest], known.images[index[closest]]], ["sample", "pixels"]
  if len(known.classes) > 1 and min(samples.shape[2:]) >= 16:
    net = trained(known, 0)
    names.append("LeNet")
    rows.append(known.images[nearest(answers(net, samples[closest])[0], answers(net, known.images)[0])[0]])
  shares = {name: (v, np.arange(1, len(v) + 1) / len(v)) for name, v in sets.items()}
  top = pictures.grid(np.concatenate(rows), len(closest), row_names=names)
  below = pictures.plot(shares, "Nearest training image", "distance (RMS, of 255)", "share of images within it")
  if not hosts.rank(): pictures.save_png(path, pictures.joined([top, below], down=True))
  print(f"wrote {path}", file=sys.stderr)
  return {name: v.tolist() for name, v in sets.items()}
