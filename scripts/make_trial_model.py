"""Write the trial model anew, after `testing/tiny_gguf.py` changed (PYTHONPATH=src)."""

from sutazai.adapters.llamacpp.spec import TRIAL_MODEL
from sutazai.testing.tiny_gguf import write_bigram

TRIAL_MODEL.parent.mkdir(exist_ok=True)
write_bigram(TRIAL_MODEL)
print(TRIAL_MODEL)
