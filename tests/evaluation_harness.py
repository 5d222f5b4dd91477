"""lm-evaluation-harness on a small model of this library: its tasks run, and its bits per byte are ours.

    pip install lm_eval
    python tests/evaluation_harness.py

Three tasks are written to a temporary folder, one of each kind of request that a language model gets: choices, the
likelihood of a whole text, and generation. Nothing is downloaded.
"""

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import dualform as df
from dualform.layers import AttentionConfig, Mamba2Config

END = "<|end|>"
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{options}"""
TASKS = {
    "sums": (
        "multiple_choice",
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]',
    ),
    "text": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]',
    ),
    "next": (
        "generate_until",
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["a"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]',
    ),
}


def main() -> int:
    """Print the harness's results, and compare what can be computed here."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    import dualform.hf as hf

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_special_tokens([END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token=END, pad_token=END)
    torch.manual_seed(0)
    parts = {"M": (Mamba2Config(d_state=16, d_head=16),), "A": (AttentionConfig(heads=2),)}
    lm = df.LanguageModel(df.ModelConfig(257, 32, parts, "MAM")).eval()
    model = hf.DualformForCausalLM(hf.DualformConfig(lm.config, eos_token_id=256), lm).eval()
    documents = [
        {"q": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1)], "text": f"the sum {a} {b}" * (a + 1)}
        for a in range(4)
        for b in range(3)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        for task, (kind, options) in TASKS.items():
            (folder / f"{task}.yaml").write_text(TASK.format(name=task, data=data, kind=kind, options=options))
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=256)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(wrapped, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    for task in TASKS:
        print(task, {key: value for key, value in found["results"][task].items() if "," in key})
    nats = size = 0
    with torch.no_grad():
        for document in documents:
            tokens = [256, *tokenizer.encode(document["text"])]
            nats += lm.loss(torch.tensor([tokens])).item() * (len(tokens) - 1)
            size += len(document["text"].encode())
    want, got = nats / math.log(2) / size, found["results"]["text"]["bits_per_byte,none"]
    print(f"bits per byte: the harness {got:.6f}, by hand {want:.6f}")
    return int(abs(got - want) > 1e-5 * want)


if __name__ == "__main__":
    sys.exit(main())
