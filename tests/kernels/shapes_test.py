import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import shapes


def test_returns_the_sizes_by_letter():
  assert shapes.check(q_BN=np.zeros((2, 3)), k_NH=np.zeros((3, 5))) == {
      'B': 2, 'N': 3, 'H': 5}


def test_a_scalar_size_of_one_is_a_size():
  with pytest.raises(ValueError, match='y_B: B is 1, but 2 in x_B'):
    shapes.check(x_B=np.zeros(2), y_B=np.zeros(1))


def test_a_mismatch_names_array_letter_and_both_sizes():
  with pytest.raises(ValueError, match='^k_NH: N is 4, but 3 in q_BN$'):
    shapes.check(q_BN=np.zeros((2, 3)), k_NH=np.zeros((4, 5)))


def test_a_letter_twice_in_one_array():
  assert shapes.check(x_DD=np.zeros((2, 2))) == {'D': 2}
  with pytest.raises(ValueError, match='^x_DD: D is 3, but 2 in x_DD$'):
    shapes.check(x_DD=np.zeros((2, 3)))


def test_a_wrong_rank_names_the_array_and_its_shape():
  with pytest.raises(ValueError, match=r'^q_BN: rank 3, shape \(2, 3, 4\)$'):
    shapes.check(q_BN=np.zeros((2, 3, 4)))


@pytest.mark.parametrize('name', ['q', 'BN', 'q_bn', 'q_', 'q_Bn'])
def test_a_name_without_axes_is_refused(name):
  with pytest.raises(ValueError, match=f'^{name}: '):
    shapes.check(**{name: np.zeros((2, 3))})


def test_only_the_last_part_of_a_name_holds_axes():
  assert shapes.check(attn_norm_D=np.zeros(4)) == {'D': 4}


def test_works_on_tracers():
  @jax.jit
  def add(x_BD, y_D):
    sizes = shapes.check(x_BD=x_BD, y_D=y_D)
    return x_BD + y_D[None, :] * sizes['B']

  assert add(jnp.ones((2, 3)), jnp.ones(3)).shape == (2, 3)
  with pytest.raises(ValueError, match='^y_D: D is 4, but 3 in x_BD'):
    add(jnp.ones((2, 3)), jnp.ones(4))


def test_works_on_abstract_shapes():
  x_BD = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  assert shapes.check(x_BD=x_BD) == {'B': 2, 'D': 3}
