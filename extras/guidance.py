"""Classifier-free guidance, Ho & Salimans 2021 (arXiv:2207.12598): not in the paper."""
import functools, math
from collections.abc import Callable
import numpy as np
from tinygrad import Tensor
from engine.streams import stream

def guided(model:Callable[[Tensor, Tensor, Tensor], Tensor], y:Tensor, w:float, null:int) -> Callable[..., Tensor]:
  """Eq. 6 of Ho & Salimans: model(x_t, t, y) with labels y (B,) -> a model(x_t, t). null: the label "no class".

  w = 1 is the plain conditional model, 0 the unconditional one, more than 1 guides (the paper's w is one less). What
  the network predicts, ε, x_0, μ or v, is linear in ε for one x_t, so the formula holds for each; a learned log σ²
  is mixed as well."""
  w = float(w)  # a number of numpy's would take the tensors' product for its own
  if w == 1: return lambda x, t: model(x, t, y)
  nulls = y.full_like(null).contiguous().realize()
  if w == 0: return lambda x, t: model(x, t, nulls)
  def both(x:Tensor, t:Tensor) -> Tensor:
    labelled, free = model(x.cat(x), t.cat(t), y.cat(nulls)).chunk(2)
    return free + w * (labelled - free)                      # ε̃ = ε(x, ∅) + w (ε(x, y) − ε(x, ∅))
  return both

def labelling(net, guidance:float, known:bool=True) -> Callable[[np.ndarray], Callable[..., Tensor]]:
  """labels (B,) -> the network as a model(x_t, t) of these labels. For each B it is one model, so that its captured
  step serves all batches and reads each one's labels. known: whether the network knows what "no class" is; ValueError
  if it does not and guidance or a label asks for it."""
  null = net.config["num_classes"]
  if null and not known and guidance != 1:
    raise ValueError("this network was always shown a class, so it can be asked with --guidance 1 alone")
  @functools.cache
  def sized(n:int) -> tuple[Tensor, Callable[..., Tensor]]:
    y = Tensor(np.full(n, null, np.int32)).realize()
    return y, guided(net, y, guidance, null)
  def labelled(labels:np.ndarray) -> Callable[..., Tensor]:
    if not known and (labels == null).any():
      raise ValueError("this network was always shown a class, so it cannot be asked without one")
    y, model = sized(len(labels))
    y.assign(Tensor(labels.astype(np.int32))).realize()
    return model
  return labelled if null else lambda labels: net

def trained(classes:int, meta:dict) -> np.ndarray:
  """Those of a network's classes of which it was shown images, int32. meta: what its checkpoint says of itself."""
  return np.setdiff1d(np.arange(classes, dtype=np.int32), meta.get("untrained", []))

def all_equally(n:int, classes:int|np.ndarray, seed:int, first:int=0) -> np.ndarray:
  """The labels (n,) of images first, first + 1, ..., for which no class was asked: all K classes equally, in any order.
  classes: K, for 0 to K−1, or their numbers (K,).

  x ~ Σ_y p(x | y) / K: each class comes once among K images. Images drawn without a label are worse."""
  own = np.arange(classes) if isinstance(classes, int | np.integer) else classes
  if not (K := len(own)): return np.zeros(n, np.int32)
  rounds = range(first // K, math.ceil((first + n) / K))
  orders = [stream(seed, "order of classes", i).permutation(own) for i in rounds]
  return np.concatenate(orders)[first % K:][:n].astype(np.int32)

def told(labels:np.ndarray|None, own:list[str], classes:int, meta:dict, n:int) -> np.ndarray|None:
  """What a model of so many classes is told of n images that are measured: without labels "no class" or nothing, else
  its number of the class that is number labels[i], of the name own[labels[i]], in the images' own set.

  meta: the checkpoint's. ValueError if the model cannot do without labels, or has none, or other classes."""
  if labels is None and not meta.get("null_class", True):
    raise ValueError("this model always needs a class (evaluate.py --labels)")
  if labels is None: return np.full(n, classes, np.int32) if classes else None
  if not classes: raise ValueError("--labels: the model was trained without classes")
  number = {name: i for i, name in enumerate(meta.get("classes") or own)}
  labels = np.array([number.get(name, classes) for name in own], np.int32)[labels]
  if labels.max() >= classes: raise ValueError("--labels: some of these images have other classes than the model")
  return labels
