"""Let EleutherAI's lm-evaluation-harness ask a running server, and print what it found.

pip install "lm-eval[api]"
python nanollama.py --serve --model smollm2 &
python examples/harness.py http://127.0.0.1:8000 QUESTIONS.jsonl

The file is one that `nanollama.py eval --task` reads, and the figures are the same. The harness's
own tasks go the same way: put their names into `tasks`, say ["hellaswag"]; it fetches questions.
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


# the harness adds no BOS to the ids that it sends: where the model wants one, prompts spell it out
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
    "target_delimiter": "",  # the choices begin with a space where one belongs
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": ask("/v1/models")["data"][0]["id"],
        "base_url": f"{args.url}/v1/completions",
        "tokenizer_backend": "remote",  # the server's own: nothing else to download
        "num_concurrent": 4,
        "max_retries": 1,
    },
    tasks=[task],
    bootstrap_iters=0,
)
figures = found["results"]["questions"]
for name in ("acc", "acc_norm"):
    print(f"{name:<8}  {figures[name + ',none']:.4f}")
