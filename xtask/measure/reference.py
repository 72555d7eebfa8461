"""The measurements that the Python package sev-snp-measure computes.

Reads a JSON array of cases, each the arguments of the example `measure`, and prints a line for each: the digest, or
`refused` and why.
"""

import argparse
import json
import sys

from sevsnpmeasure import guest, vcpu_types, vmm_types
from sevsnpmeasure.sev_mode import SevMode

parser = argparse.ArgumentParser()
parser.add_argument("mode")
for option in ("--ovmf", "--vcpu-type", "--kernel", "--initrd", "--append"):
    parser.add_argument(option)
parser.add_argument("--vcpus", type=int, default=0)
parser.add_argument("--vmm", default="qemu")
parser.add_argument("--features", type=lambda text: int(text, 0), default=1)

for case in json.load(sys.stdin):
    given = parser.parse_args(case)
    vmm = vmm_types.VMMType["QEMU" if given.vmm == "qemu" else given.vmm]
    signature = vcpu_types.CPU_SIGS[given.vcpu_type] if given.vcpu_type else 0
    try:
        digest = guest.calc_launch_digest(
            SevMode.from_str(given.mode),
            given.vcpus,
            signature,
            given.ovmf,
            given.kernel,
            given.initrd,
            given.append,
            given.features,
            vmm_type=vmm,
        )
        print(digest.hex())
    except RuntimeError as error:
        print(f"refused: {error}")
