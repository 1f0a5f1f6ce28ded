import warnings

from forge_lightning.callbacks import RNGState


def test_a_warning_names_the_line_that_found_the_reason_and_comes_once():
    callback = RNGState()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            callback.warn_once("something is odd")
    assert [(str(w.message), w.filename) for w in caught] == [("RNGState: something is odd", __file__)]
