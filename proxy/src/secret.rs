//! Texts that are for nobody's eyes.

use std::fmt;

use zeroize::Zeroizing;

/// A text that no log and no error shows; cleared when dropped.
#[derive(Clone, Default)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Of a text that is given away, so that no copy of it stays.
    pub fn from_string(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself, for whom it is meant.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(Zeroizing::new(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}
