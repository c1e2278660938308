//! Sealing to the read key, or to a writer: HPKE base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM (RFC 9180).

use std::fmt;

use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::rand_core::{CryptoRng, RngCore};
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal};
use world::Entropy;
use zeroize::Zeroizing;

use super::secret;
use zeroize::{Zeroize, ZeroizeOnDrop};

secret! {
    /// The X25519 secret that opens data keys and shared keys. Needed only where branches are opened or maintenance runs.
    pub ReadSecret
}

/// The public half of a [`ReadSecret`]: all that a writer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadPublic(pub [u8; 32]);

/// Opens what is sealed to one writer.
pub type SealingSecret = ReadSecret;
/// The public half of a [`SealingSecret`], as the writer's grant names it.
pub type SealingPublic = ReadPublic;

/// A secret sealed to a read key: encapsulated key (32 bytes), then ciphertext and tag.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SealedKey(pub Vec<u8>);

impl fmt::Debug for SealedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedKey({} bytes)", self.0.len())
    }
}

const ENCAPSULATED_LEN: usize = 32;

impl ReadSecret {
    /// A new secret.
    pub fn generate(entropy: &dyn Entropy) -> ReadSecret {
        ReadSecret(entropy.bytes())
    }

    fn private(&self) -> <X25519HkdfSha256 as Kem>::PrivateKey {
        Deserializable::from_bytes(&self.0).expect("every 32 bytes are an X25519 private key")
    }

    /// The public half.
    pub fn public(&self) -> ReadPublic {
        let public = X25519HkdfSha256::sk_to_pk(&self.private()).to_bytes();
        ReadPublic(public.as_slice().try_into().expect("an X25519 public key has 32 bytes"))
    }

    /// Opens what was sealed with the same `info` and `associated`; `None` if it was not sealed to this key or was
    /// changed since.
    pub fn unseal(&self, sealed: &SealedKey, info: &[u8], associated: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (encapsulated, ciphertext) = sealed.0.split_at_checked(ENCAPSULATED_LEN)?;
        let encapsulated = Deserializable::from_bytes(encapsulated).ok()?;
        single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.private(),
            &encapsulated,
            info,
            ciphertext,
            associated,
        )
        .ok()
        .map(Zeroizing::new)
    }
}

impl ReadPublic {
    /// Seals `secret` so that only the read secret opens it. `info` separates purposes, `associated` is bound but
    /// not contained. `None` if this is no usable public key.
    pub fn seal(&self, secret: &[u8], info: &[u8], associated: &[u8], entropy: &dyn Entropy) -> Option<SealedKey> {
        let recipient = Deserializable::from_bytes(&self.0).ok()?;
        let (encapsulated, ciphertext) = single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256, _>(
            &OpModeS::Base,
            &recipient,
            info,
            secret,
            associated,
            &mut EntropyAsRng(entropy),
        )
        .ok()?;
        let mut bytes = encapsulated.to_bytes().to_vec();
        bytes.extend_from_slice(&ciphertext);
        Some(SealedKey(bytes))
    }
}

/// The world's randomness in the form the cipher crates ask for.
struct EntropyAsRng<'a>(&'a dyn Entropy);

impl RngCore for EntropyAsRng<'_> {
    fn next_u32(&mut self) -> u32 {
        u32::from_le_bytes(self.0.bytes())
    }

    fn next_u64(&mut self) -> u64 {
        u64::from_le_bytes(self.0.bytes())
    }

    fn fill_bytes(&mut self, buffer: &mut [u8]) {
        self.0.fill(buffer);
    }
}

impl CryptoRng for EntropyAsRng<'_> {}
