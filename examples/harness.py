"""Let EleutherAI's lm-evaluation-harness ask a running server, and print its figures.

pip install "lm-eval[api]"
nanollama --serve --model smollm2 &
python examples/harness.py http://127.0.0.1:8000 QUESTIONS.jsonl

The script reads the same file as `nanollama eval --task` and finds the same figures. To run the
harness's own tasks, put their names into `tasks`, such as ["hellaswag"]; the harness downloads the
questions.
"""

import argparse
import json
import urllib.request

import lm_eval

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("url", metavar="URL", help="address of the server")
parser.add_argument("file", metavar="FILE", help="JSON lines with prompt, choices and answer")
args = parser.parse_args()


def ask(path, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(args.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


# The harness sends ids without BOS. If the model needs BOS, the prompts contain it as text.
wants_bos = ask("/tokenize", {"prompt": ""})["tokens"]
bos = ask("/tokenizer_info")["bos_token"] if wants_bos else ""
task = {
    "task": "questions",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": args.file}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": bos + "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",  # the choices bring their own leading space
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": ask("/v1/models")["data"][0]["id"],
        "base_url": f"{args.url}/v1/completions",
        "tokenizer_backend": "remote",  # the server tokenizes, so there is nothing to download
        "num_concurrent": 4,
        "max_retries": 1,
    },
    tasks=[task],
    bootstrap_iters=0,
)
figures = results["results"]["questions"]
for name in ("acc", "acc_norm"):
    print(f"{name:<8}  {figures[name + ',none']:.4f}")
