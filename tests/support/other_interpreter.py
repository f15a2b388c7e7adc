"""Run by conftest.run_elsewhere in a separate interpreter: load checkpoints where hf_kernel_ffn
does not exist.

Reads jobs from the JSON file argv[1]; writes tensors to argv[2] (safetensors) and, beside it,
errors by job (JSON).
"""

import json
import sys


class NoPackage:
    """An import hook: the package is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_kernel_ffn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoPackage())
try:
    import hf_kernel_ffn  # noqa: F401

    raise SystemExit("hf_kernel_ffn can be imported: this interpreter proves nothing")
except ModuleNotFoundError:
    pass

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)


def load(folder, auto, trust_remote_code=True, **_):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust_remote_code)


def main(jobs_file, results_file):
    with open(jobs_file) as stream:
        job_list = json.load(stream)
    ids, results, errors = load_file(job_list["ids"])["ids"], {}, {}
    for job in job_list["jobs"]:
        try:
            model = load(**job)
            if job.get("resave"):
                model.save_pretrained(job["resave"])
                model = load(job["resave"], job["auto"])
            with torch.no_grad():
                output = model(**load_file(job["inputs"])) if job.get("inputs") else model(ids)
                results[job["name"]] = output[0].contiguous()
        except Exception as error:
            errors[job["name"]] = f"{type(error).__name__}: {error}"
    assert not [name for name in sys.modules if name.startswith("hf_kernel_ffn")]
    save_file(results, results_file)
    with open(results_file + ".errors.json", "w") as stream:
        json.dump(errors, stream)


main(*sys.argv[1:])
