"""Learning tasks one after another with one adapter (or one model): tasks, methods, the loop and its measures.

tasks = [hatcl.continual.label_word_task(n, texts, encoder, tokenizer) for n, texts in corpora.items()]
model = peft.get_peft_model(encoder, peft.LoraConfig(r=8, target_modules=["query", "value"]))
result = hatcl.continual.learn_sequence(model, tasks, "tasl", {"epochs": 2}, folder="run")
"""

from ..data.texts import TextData, Turn, read_texts
from ..engine.loop import Progress
from .generation import causal_task, seq2seq_task
from .images import ImageLearning, ImageOptions, image_tasks
from .label_words import label_word_task
from .methods import Batch, Method, continual_method, list_continual_methods, make_method
from .options import LearnOptions
from .result import SequenceResult
from .sequence import learn_sequence
from .tasks import ContinualTask

__all__ = [
    "Batch",
    "ContinualTask",
    "ImageLearning",
    "ImageOptions",
    "LearnOptions",
    "Method",
    "Progress",
    "SequenceResult",
    "TextData",
    "Turn",
    "causal_task",
    "continual_method",
    "image_tasks",
    "label_word_task",
    "learn_sequence",
    "list_continual_methods",
    "make_method",
    "read_texts",
    "seq2seq_task",
]
