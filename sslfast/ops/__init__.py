"""The primitives, one file each: reference, backends, gradient, public function."""

from sslfast.ops._backend import available_backends, use_backend
from sslfast.ops.augment_views import augment_views
from sslfast.ops.block_mask import block_patch_mask
from sslfast.ops.ema import ema_update_
from sslfast.ops.embed_visible_patches import embed_visible_patches
from sslfast.ops.guided_lse import guided_lse
from sslfast.ops.masked_patch_mse import masked_patch_l1, masked_patch_mse, patchify, unpatchify
from sslfast.ops.packed_images import PackedImages, pack_images
from sslfast.ops.pair_products import pair_products
from sslfast.ops.patch_mask import PatchMask, random_patch_mask
from sslfast.ops.patches import gather_patches, restore_patches
from sslfast.ops.similarity_bce import similarity_bce
from sslfast.ops.similarity_lse import similarity_lse
from sslfast.ops.soft_cross_entropy import soft_cross_entropy
from sslfast.ops.view_params import ViewParams
from sslfast.ops.view_specs import ViewSpec, view_specs

__all__ = [
    "PackedImages",
    "PatchMask",
    "ViewParams",
    "ViewSpec",
    "augment_views",
    "available_backends",
    "block_patch_mask",
    "ema_update_",
    "embed_visible_patches",
    "gather_patches",
    "guided_lse",
    "masked_patch_l1",
    "masked_patch_mse",
    "pack_images",
    "pair_products",
    "patchify",
    "random_patch_mask",
    "restore_patches",
    "similarity_bce",
    "similarity_lse",
    "soft_cross_entropy",
    "unpatchify",
    "use_backend",
    "view_specs",
]
