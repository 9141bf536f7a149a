"""tinygrad's cache on the disk from several threads."""
import threading
from tinygrad import helpers

own, first, lock = threading.local(), helpers.db_connection, threading.Lock()

def connection():
  """The main thread's connection is tinygrad's own; each other thread has one of its own."""
  with lock:
    if threading.current_thread() is threading.main_thread(): return first()
    if hasattr(own, "db"): return own.db
    kept, helpers._db_connection = helpers._db_connection, None
    try: own.db = first()
    finally: helpers._db_connection = kept
    return own.db

def install():
  """SQLite refuses a connection in a thread that did not open it, and tinygrad has one for the whole process: training
  in a thread ended in an error if another thread had used tinygrad. It stays installed, because kernels are looked up
  outside of `scope` too; to the main thread it changes nothing. A connection for each thread in tinygrad would make
  this unnecessary."""
  helpers.db_connection = connection
