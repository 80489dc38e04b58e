'use server'
import { redirect } from 'next/navigation'
export async function shout(form) {
  redirect('/said/' + String(form.get('word')).toUpperCase())
}
