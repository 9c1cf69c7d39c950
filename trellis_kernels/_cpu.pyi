from torch import Tensor

def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...

# attention

# gaussians

# mesh_extraction

# serialization

# sparse_conv

# voxel_hash
