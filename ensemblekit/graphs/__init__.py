"""Owns the way from members to an ONNX graph, unverified: `make` does all of it.

Input: ready members, a head, and an example of the inputs. `template` exports one member with its
weights left open; `folding` takes BatchNorm into the layers before it; `lifting` puts the weights
of all members in, running once what is the same in all of them; `fusing` has the rules by which one
operator does the work of K.
"""
