//! The escape key of the console.

/// Ctrl-A.
const KEY: u8 = 0x01;

/// What `Ctrl-A h` shows.
pub const HELP: &[u8] = b"\r\n\
    Ctrl-A x       end the virtual machine\r\n\
    Ctrl-A p       press its power button\r\n\
    Ctrl-A h       this help\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A\r\n";

/// What a key means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// End the VM.
    Quit,
    /// Press the power button.
    Power,
    /// Show [`HELP`].
    Help,
}

/// Finds the escape key in what is typed.
#[derive(Debug)]
pub struct Escape {
    /// The last key was the escape key.
    escaped: bool,
}

impl Escape {
    /// After a key that was, or was not, the escape key.
    pub fn new(escaped: bool) -> Self {
        Self { escaped }
    }

    /// Whether the last key was the escape key.
    pub fn escaped(&self) -> bool {
        self.escaped
    }

    /// Takes one key. Passes what is for the guest to `send`, up to two bytes: a key that has no
    /// meaning after Ctrl-A is sent with it.
    pub fn key(&mut self, key: u8, mut send: impl FnMut(&[u8])) -> Option<Action> {
        if !self.escaped {
            match key {
                KEY => self.escaped = true,
                _ => send(&[key]),
            }
            return None;
        }
        self.escaped = false;
        match key {
            b'x' => return Some(Action::Quit),
            b'p' => return Some(Action::Power),
            b'h' => return Some(Action::Help),
            KEY => send(&[KEY]),
            _ => send(&[KEY, key]),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_actions() {
        let mut escape = Escape::new(false);
        let mut sent: Vec<u8> = Vec::new();
        let mut actions = Vec::new();
        for key in *b"ab\x01xx\x01pp\x01hh\x01\x01c\x01l" {
            actions.extend(escape.key(key, |bytes| sent.extend(bytes)));
        }
        assert_eq!(actions, [Action::Quit, Action::Power, Action::Help]);
        assert_eq!(sent, b"abxph\x01c\x01l");
    }
}
