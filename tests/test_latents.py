"""The latents file."""

import copy
import dataclasses
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import eqx_cogvae as cv
from eqx_cogvae._latents import (
    Latents,
    check_latents,
    exact_fingerprint,
    fingerprint,
    load_latents,
    save_latents,
)

CONFIG = cv.Config(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4
)


def noise(shape=(1, 3, 5, 6, 4), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def full(array):
    return Latents(array, False, 0.7, True, 8.0, 40, 48, 8, 9, "0123456789ab")


def words(latents):
    """All but the arrays."""
    return {name: value for name, value in vars(latents).items() if not hasattr(value, "shape")}


def test_latents_are_told_apart_by_identity():
    one, other = full(noise()), full(noise())
    assert one == one and one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("layout", ["BTHWC", "BCTHW"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16])
def test_round_trip(layout, dtype, tmp_path):
    latents = full(noise(dtype=dtype))
    save_latents(tmp_path / "z.safetensors", latents, layout=layout)
    read = load_latents(tmp_path / "z.safetensors", channels=4)
    assert read.array.dtype == dtype
    np.testing.assert_array_equal(read.array, latents.array)
    assert words(read) == words(latents)
    assert len(list(tmp_path.iterdir())) == 1


def test_metadata_is_what_others_can_read(tmp_path):
    save_latents(tmp_path / "z.safetensors", full(noise()))
    with safetensors.safe_open(tmp_path / "z.safetensors", framework="numpy") as file:
        assert file.metadata() == {
            "format": "eqx_cogvae.latents.1",
            "layout": "BTHWC",
            "dtype": "float32",
            "scaled": "false",
            "scaling_factor": "0.7",
            "invert_scale_latents": "true",
            "fps": "8.0",
            "height": "40",
            "width": "48",
            "frames": "8",
            "padded": "9",
            "fingerprint": "0123456789ab",
        }
        assert list(file.keys()) == ["latents"]


@pytest.mark.parametrize("layout", ["BTHWC", "BCTHW"])
def test_a_posterior_and_its_source(layout, tmp_path):
    latents = dataclasses.replace(
        full(noise()), logvar=-noise(), source="é.mp4", source_sha256="0" * 64, start=49, seed=7
    )
    save_latents(tmp_path / "z.safetensors", latents, layout=layout)
    read = load_latents(tmp_path / "z.safetensors", channels=4)
    np.testing.assert_array_equal(read.array, latents.array)
    np.testing.assert_array_equal(read.logvar, latents.logvar)
    assert words(read) == words(latents)
    save_latents(tmp_path / "again.safetensors", read, layout=layout)
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == (tmp_path / "z.safetensors").read_bytes()


def foreign(path, array, name="latents", metadata=None):
    safetensors.numpy.save_file({name: np.ascontiguousarray(array)}, path, metadata)


@pytest.mark.parametrize(
    ("axes", "options", "metadata"),
    [
        ((0, 4, 1, 2, 3), {"channels": 4}, None),
        ((0, 1, 2, 3, 4), {"channels": 4}, None),
        ((0, 4, 1, 2, 3), {"layout": "BCTHW"}, None),
        ((0, 4, 1, 2, 3), {}, {"layout": "BCTHW"}),
    ],
)
@pytest.mark.parametrize("name", ["latents", "z"])
def test_foreign_layouts(axes, options, metadata, name, tmp_path):
    foreign(tmp_path / "z.safetensors", noise().transpose(axes), name, metadata)
    read = load_latents(tmp_path / "z.safetensors", **options)
    np.testing.assert_array_equal(read.array, noise())
    assert read.fps is None and not read.scaled


@pytest.mark.parametrize(
    ("shape", "options", "metadata", "match"),
    [
        ((1, 4, 5, 6, 4), {"channels": 4}, None, "does not tell it: give BTHWC or BCTHW"),
        ((1, 3, 5, 6, 4), {}, None, "does not say its layout"),
        ((1, 3, 5, 6, 8), {"channels": 4}, None, "no axis for 4 channels"),
        ((1, 3, 5, 6, 8), {"channels": 4}, {"layout": "BTHWC"}, "have 8 channels, the model has 4"),
        (
            (1, 3, 5, 6, 4),
            {"layout": "BCTHW"},
            {"layout": "BTHWC"},
            "layout BTHWC in its metadata, and `layout` is",
        ),
        ((1, 3, 5, 6, 4), {}, {"layout": "TBHWC"}, "got 'TBHWC'"),
        (
            (1, 3, 5, 6, 4),
            {},
            {"layout": "BTHWC", "fps": "x"},
            "bad value in its metadata, fps='x'",
        ),
        ((1, 3, 5, 6, 4), {}, {"layout": "BTHWC", "scaled": "maybe"}, "metadata, scaled='maybe'"),
        (
            (3, 5, 6, 4),
            {"channels": 4},
            None,
            r"five axes, none of them empty, got shape \(3, 5, 6, 4\)",
        ),
    ],
)
def test_what_does_not_fit(shape, options, metadata, match, tmp_path):
    foreign(tmp_path / "z.safetensors", noise(shape), metadata=metadata)
    with pytest.raises(ValueError, match=match) as caught:
        load_latents(tmp_path / "z.safetensors", **options)
    assert "\n" not in str(caught.value)


def whole():
    return safetensors.numpy.save({"latents": noise()})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (whole()[:100], "not a complete safetensors file"),
        (whole()[:-7], "not a complete safetensors file"),
        (b"", "not a complete safetensors file"),
        (b"PK\x03\x04 zip", "is a pickle or an archive"),
        (b"\x80\x04 pickle", "is a pickle or an archive"),
        (safetensors.numpy.save({"a": noise(), "b": noise()}), "it holds 2: a, b"),
        (safetensors.numpy.save({}), "it holds 0"),
        (
            safetensors.numpy.save({"latents": np.zeros((1, 3, 5, 6, 4), int)}),
            "floating, got int64",
        ),
    ],
)
def test_bad_files(content, match, tmp_path):
    path = tmp_path / "z.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        load_latents(path, channels=4)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no latents file at"):
        load_latents(tmp_path / "z.safetensors")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        load_latents(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_latents_are_the_culprit(value, tmp_path):
    broken = noise()
    broken[0, 1, 2, 3, 1:3] = value
    match = (
        r"hold 2 NaN or infinite values of 360, the first at \(b, t, h, w, c\) = "
        r"\(0, 1, 2, 3, 1\): the latents are broken, not the VAE"
    )
    with pytest.raises(ValueError, match=match):
        check_latents(broken)
    with pytest.raises(ValueError, match=match):
        save_latents(tmp_path / "z.safetensors", Latents(broken))
    assert not list(tmp_path.iterdir())
    foreign(tmp_path / "z.safetensors", broken)
    with pytest.raises(ValueError, match=r"latents in .*z\.safetensors " + match):
        load_latents(tmp_path / "z.safetensors", channels=4)


def test_large_float64_latents_are_finite():
    check_latents(np.full((1, 1, 1, 1, 4), 1e200))


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"floating, of shape .* got int64"):
        check_latents(np.zeros((1, 1, 2, 2, 4), int))
    with pytest.raises(ValueError, match=r"got float64 of shape \(2, 2, 4\)"):
        check_latents(np.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match="one of BTHWC, BCTHW, got 'BHWTC'"):
        save_latents(tmp_path / "z.safetensors", full(noise()), layout="BHWTC")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        save_latents(tmp_path / "no" / "z.safetensors", full(noise()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_big_endian_arrays(dtype, tmp_path):
    array = noise().astype(dtype)
    latents = dataclasses.replace(full(array), logvar=-array)
    save_latents(tmp_path / "z.safetensors", latents)
    read = load_latents(tmp_path / "z.safetensors")
    assert read.array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(read.array, array)
    np.testing.assert_array_equal(read.logvar, -array)


@pytest.mark.parametrize(
    ("logvar", "match"),
    [
        (np.full_like(noise(), np.nan), r"the logvar of latents\S* .*hold 360 NaN or infinite"),
        (noise((1, 3, 5, 6, 2)), r"have the shape of their mean, \(1, 3, .* got \(1, 3, 5, 6, 2\)"),
        (noise((1, 3, 5, 6)), r"the logvar of latents\S* .*"),
        (noise().astype(np.int32), r"the logvar of latents\S* .* got int32|floating, got int32"),
    ],
    ids=["nan", "channels", "rank", "dtype"],
)
def test_a_broken_posterior(logvar, match, tmp_path, unchecked):
    path = tmp_path / "z.safetensors"
    with pytest.raises(ValueError, match=match):
        save_latents(path, dataclasses.replace(full(noise()), logvar=logvar))
    assert not path.exists()
    tensors = {"latents": noise(), "logvar": logvar}
    safetensors.numpy.save_file(tensors, path, {"layout": "BTHWC"})
    with pytest.raises(ValueError, match=rf"z\.safetensors.*|{match}") as info:
        load_latents(path)
    assert "z.safetensors" in str(info.value)


@pytest.mark.parametrize(
    "fields",
    [
        *({"fps": np.inf}, {"fps": np.nan}, {"fps": 0.0}, {"fps": -8.0}, {"frames": 0}),
        *({"height": -1}, {"start": -1}, {"scaling_factor": np.inf}, {"fingerprint": "../x"}),
        *({"source": "\udcff.mp4"}, {"source_sha256": "x"}, {"scaled": "maybe"}, {"width": 1.5}),
    ],
    ids=str,
)
def test_fields_that_could_not_be_read_back(fields, tmp_path, unchecked):
    ((name, _),) = fields.items()
    with pytest.raises(ValueError, match=rf"latents with {name}=.* cannot be written to \S+z\.saf"):
        save_latents(tmp_path / "z.safetensors", dataclasses.replace(full(noise()), **fields))
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_of_fractions(tmp_path, unchecked):
    latents = Latents(
        noise(), np.bool_(True), np.float32(0.5), fps=Fraction(15, 2), frames=np.int64(9)
    )
    save_latents(tmp_path / "z.safetensors", latents)
    read = load_latents(tmp_path / "z.safetensors")
    assert (read.scaled, read.scaling_factor, read.fps, read.frames) == (True, 0.5, 7.5, 9)


def test_dtypes_that_files_have_not(tmp_path, unchecked):
    for dtype in (np.longdouble, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match="in one of float64, float32, float16, bfloat16, got"):
            save_latents(tmp_path / "z.safetensors", full(noise().astype(dtype)))


def test_a_full_disk_is_named_by_the_destination(tmp_path):
    resource = pytest.importorskip("resource", reason="limits on files are of Unix")
    vae, old = model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    save = lambda path: cv.save_pretrained(vae, path)  # noqa: E731
    for write, path in ((save_full, tmp_path / "z.safetensors"), (save, tmp_path / "vae")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
        try:
            with pytest.raises(OSError, match="File too large") as info:
                write(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert info.value.filename == str(path) and str(info.value).endswith(f": '{path}'")
    assert not list(tmp_path.iterdir())


def save_full(path):
    save_latents(path, full(noise()))


def model(seed=0, dtype=jnp.float32, pad_mode="first", **fields):
    config = dataclasses.replace(CONFIG, **fields)
    return cv.VAE(config, key=jax.random.key(seed), dtype=dtype, pad_mode=pad_mode)


def test_fingerprint_tells_models_apart():
    vae = model()
    assert len(fingerprint(vae)) == 12
    assert fingerprint(vae) == fingerprint(model())
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae)
    assert fingerprint(vae) == fingerprint(halved)
    assert fingerprint(vae) != fingerprint(model(seed=1))
    assert fingerprint(vae) != fingerprint(model(scaling_factor=0.7))


def test_fingerprints_of_ordinary_models_stay():
    """They are in people's files. The digits were those of version 0.1.0."""
    vae = cv.from_pretrained("tiny")
    assert fingerprint(vae) == "36445e18a238"
    assert exact_fingerprint(vae).startswith("dc97bc3651d8")


def other_block(vae, **fields):
    """The model with other fields in its last block."""
    at = lambda vae: vae.decoder.up_blocks[-1].resnets[-1]  # noqa: E731
    block = copy.copy(at(vae))
    for name, value in fields.items():
        object.__setattr__(block, name, value)
    return eqx.tree_at(at, vae, block)


class Scaled(eqx.Module):
    """A norm of a user's, whose only number is a leaf and no array."""

    by: float

    def __call__(self, x, latents=None):
        return self.by * x


def test_whatever_changes_the_function_changes_the_fingerprint():
    vae = model()
    models = [
        vae,
        model(pad_mode="replicate"),
        other_block(vae, act_fn="relu"),
        other_block(vae, norm1=Scaled(2.0)),
        other_block(vae, norm1=Scaled(3.0)),
        other_block(vae, norm1=jnp.tanh),
        other_block(vae, norm1=jnp.sinh),
        eqx.tree_at(lambda v: v.encoder, vae, None),
        eqx.tree_at(lambda v: v.decoder, vae, None),
    ]
    for digits in (fingerprint, exact_fingerprint):
        assert len({digits(each) for each in models}) == len(models)
        # Padding by the first frame is the same under either name.
        assert digits(model(pad_mode="constant")) == digits(vae)
        host = jax.tree.map(np.asarray, vae)
        swapped = jax.tree.map(lambda x: x.astype(x.dtype.newbyteorder(">")), host)
        assert digits(host) == digits(swapped) == digits(vae)
