//! The user's terminal, while a guest's console is on it.

use std::io::{self, stdin};
use std::os::fd::AsFd;
use std::panic;
use std::sync::{Mutex, PoisonError};

use crate::sys;

/// The settings to go back to.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Raw mode of the terminal on standard input, until dropped or until a panic.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Passes every key on to the guest. `None` where standard input is not a terminal that this
    /// process is in front of.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = stdin();
        let Ok(mode) = sys::terminal_mode(stdin.as_fd()) else {
            return Ok(None);
        };
        if !sys::in_foreground(stdin.as_fd()) {
            return Ok(None);
        }
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(mode);
        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            default(info);
        }));
        let mut raw = mode;
        sys::make_raw(&mut raw);
        sys::set_terminal_mode(stdin.as_fd(), &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(mode) = saved {
        // If the terminal is gone there is nothing to go back to.
        let _ = sys::set_terminal_mode(stdin().as_fd(), &mode);
    }
}
